"""The paper's result tables with our rows below, each with its manifest.

    python -m vqrae.eval.results.evaluate scores=[runs/evaluation/geneval/scores.json,runs/evaluation/dpg/scores.json] output=results.md

Reads what the evaluations write: reconstruction, GenEval (also over scenes), DPG-Bench, and the folder of understanding
benchmarks with one JSON file each. A score that was not taken as the paper's were says so in its label and in its note.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqrae.common.cli import parse
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, write_json, write_text
from vqrae.eval.results.paper_tables import (
    GENERATION,
    IMAGENET_VALIDATION,
    RECONSTRUCTION,
    UNDERSTANDING,
    PaperTable,
)
from vqrae.eval.tables import markdown_table

GENEVAL_COLUMNS = {
    "single_object": "Sgl",
    "two_object": "Two",
    "counting": "Cnt",
    "colors": "Col",
    "position": "Pos",
    "color_attr": "Attr",
    "overall": "GenEval",
}
GENEVAL_IMAGES = 4  # of each prompt
DPG_PROMPTS = 1065
PAPER_SIZE, PAPER_PROTOCOL = 256, "titok"  # of Table 2 (arXiv 2511.23386, Table 2 and appendix B.3)
DPG_COLUMNS = {
    "global": "Glob",
    "entity": "Ent",
    "attribute": "Attrib",
    "relation": "Rel",
    "other": "Oth",
}
UNDERSTANDING_COLUMNS = {
    "pope": "POPE",
    "gqa": "GQA",
    "textvqa": "TQA",
    "mmbench": "MMB",
    "mme": "MME-P",
    "seedbench": "SEED",
    "mmmu": "MMMU",
    "ai2d": "AI2D",
}


@dataclass(frozen=True)
class Score:
    """A row of ours: where it belongs, its cells by column, why it does not compare with the paper's, what decided it."""

    table: PaperTable
    label: str
    values: dict[str, Any]
    reservations: tuple[str, ...]
    manifest: dict[str, Any]
    source: str


def read_score(path: str | Path) -> Score:
    """The row that an evaluation's output gives.

    Raises:
        ValueError: when it is none of those that are known.
    """
    path = Path(path)
    if path.is_dir():
        return _understanding(path)
    stored = read_json(path)
    try:
        if "dpg" in stored:
            return _dpg(stored, str(path))
        if str(stored.get("benchmark", "")).startswith("GenEval"):
            return _geneval(stored, str(path))
        if "psnr" in stored and "protocol" in stored:
            return _reconstruction(stored, str(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no score as an evaluation writes it: {error!r}") from error
    raise ValueError(
        f"{path} is no score that a table has: expected the JSON of reconstruction, GenEval or DPG-Bench, or the folder of "
        "understanding benchmarks"
    )


def _geneval(stored: dict[str, Any], source: str) -> Score:
    reservations = []
    if stored["benchmark"] != "GenEval":
        reservations.append(f"detector {stored['manifest']['detector']} instead of GenEval's")
    if stored["manifest"]["suite"] != "official":
        reservations.append(
            f"prompts are suite {stored['manifest']['suite']}, not the official 553"
        )
    if stored.get("incomplete"):
        reservations.append(f"{len(stored['incomplete'])} prompts lack images")
    elif stored["num_images"] != GENEVAL_IMAGES * stored["num_prompts"]:
        images, prompts = stored["num_images"], stored["num_prompts"]
        reservations.append(
            f"{images} images of {prompts} prompts, GenEval has {GENEVAL_IMAGES} of each"
        )
    if stored.get("leakage", {}).get("normalized"):
        reservations.append(
            f"{stored['leakage']['normalized']} prompts are among the training captions"
        )
    values = {column: stored[key] for key, column in GENEVAL_COLUMNS.items() if key in stored}
    return Score(
        GENERATION, stored["benchmark"], values, tuple(reservations), stored["manifest"], source
    )


def _dpg(stored: dict[str, Any], source: str) -> Score:
    reservations = []
    if "(mplug)" not in stored["benchmark"]:
        reservations.append(f"judge {stored['manifest']['judge']} instead of mPLUG")
    if stored["manifest"]["questions"] == "scenes":
        reservations.append("prompts and questions are about embedded scenes")
    elif stored["num_prompts"] != DPG_PROMPTS:
        reservations.append(f"{stored['num_prompts']} of DPG-Bench's {DPG_PROMPTS:,} prompts")
    if stored["manifest"]["formulas"] == "corrected":
        reservations.append(
            "categories by the corrected formulas, of which the published script departs"
        )
    if lost := stored["num_prompts"] - stored["num_scored"]:
        reservations.append(f"{lost} of {stored['num_prompts']} prompts are not scored")
    values = {column: stored["categories"].get(key) for key, column in DPG_COLUMNS.items()} | {
        "DPG": stored["dpg"]
    }
    return Score(
        GENERATION, stored["benchmark"], values, tuple(reservations), stored["manifest"], source
    )


def _reconstruction(stored: dict[str, Any], source: str) -> Score:
    values = {"rFID": stored.get("rfid"), "PSNR": stored["psnr"], "SSIM": stored["ssim"]}
    protocol, images = stored["protocol"], stored["num_images"]
    reservations = []
    if not (stored.get("imagenet_validation") and images == IMAGENET_VALIDATION):
        reservations.append(
            f"{images} images of {stored['data']}, the paper: ImageNet's 50,000 of validation"
        )
    size = protocol.get("score_size") or stored.get("image_size")
    if size != PAPER_SIZE:
        reservations.append(f"compared at {size} px, the paper: at {PAPER_SIZE}")
    if protocol["name"] != PAPER_PROTOCOL:
        reservations.append(
            f"protocol {protocol['name']}, the paper: 1d-tokenizer's code, which {PAPER_PROTOCOL} follows"
        )
    if reason := stored.get("not_measured", {}).get("rfid"):
        reservations.append(f"rFID not measured: {reason}")
    keys = ("tokenizer", "data", "split", "protocol", "image_size", "packages")
    manifest = {key: stored[key] for key in keys if key in stored}
    return Score(
        RECONSTRUCTION,
        f"protocol {protocol['name']}",
        values,
        tuple(reservations),
        manifest,
        source,
    )


def _understanding(folder: Path) -> Score:
    found = {}
    for path in sorted(folder.glob("*.json")):
        stored = read_json(path)
        if (
            isinstance(stored, dict)
            and path.stem in UNDERSTANDING_COLUMNS
            and {"score", "manifest"} <= stored.keys()
        ):
            found[path.stem] = stored
    if not found:
        raise ValueError(
            f"{folder} holds no scores: expected one of {', '.join(UNDERSTANDING_COLUMNS)} as NAME.json"
        )
    values = {UNDERSTANDING_COLUMNS[name]: stored["score"] for name, stored in found.items()}
    limits = {
        name: stored["settings"]["limit"]
        for name, stored in found.items()
        if stored.get("settings", {}).get("limit")
    }
    reservations = [f"{name}: at most {limit} questions, a trial" for name, limit in limits.items()]
    manifest = {
        name: {**stored["manifest"], **stored.get("settings", {})} for name, stored in found.items()
    }
    return Score(UNDERSTANDING, "lmms-eval", values, tuple(reservations), manifest, str(folder))


# ---- output


def as_json(scores: Sequence[Score]) -> dict[str, Any]:
    """All tables that any of our rows belongs to: title, columns, and rows of label, values and, if ours, the rest."""
    tables = []
    for table in _tables(scores):
        paper = [
            {
                "label": row[0],
                "source": "paper",
                "values": dict(zip(table.columns, row[1:], strict=True)),
            }
            for row in table.rows
        ]
        ours = [
            {
                "label": score.label,
                "source": score.source,
                "values": {column: score.values.get(column) for column in table.columns},
                "reservations": list(score.reservations),
                "manifest": score.manifest,
            }
            for score in scores
            if score.table is table
        ]
        tables.append(
            {"title": table.title, "columns": list(table.columns), "rows": [*paper, *ours]}
        )
    return {"tables": tables}


def markdown(scores: Sequence[Score]) -> str:
    """The same for people: our rows are numbered, and the notes say what each number rests on."""
    numbers = {id(score): i for i, score in enumerate(scores, start=1)}
    lines = ["# Results beside the paper's", ""]
    for table in _tables(scores):
        rows = [
            [str(row[0]), *_cells(table, dict(zip(table.columns, row[1:], strict=True)))]
            for row in table.rows
        ]
        for score in scores:
            if score.table is table:
                label = f"**ours: {score.label}** [{numbers[id(score)]}]{' ≠' if score.reservations else ''}"
                rows.append([label, *_cells(table, score.values)])
        lines += [f"## {table.title}", "", *markdown_table(("method", *table.columns), rows), ""]
    if any(score.reservations for score in scores):
        lines += ["≠ was not taken as the paper's scores were; the note says how it differs.", ""]
    for score in scores:
        lines += [f"**[{numbers[id(score)]}]** `{score.source}`", ""]
        lines += [f"- ≠ {reservation}" for reservation in score.reservations]
        lines += [
            f"- {key}: `{_short(value)}`"
            for key, value in score.manifest.items()
            if key not in ("packages", "command")
        ]
        lines.append("")
    return "\n".join(lines)


def _tables(scores: Iterable[Score]) -> list[PaperTable]:
    wanted = [score.table for score in scores]
    return [table for table in (RECONSTRUCTION, UNDERSTANDING, GENERATION) if table in wanted]


def _cells(table: PaperTable, values: dict[str, Any]) -> list[str]:
    cells = []
    for column, digits in zip(table.columns, table.digits, strict=True):
        value = values.get(column)
        cells.append(
            "—"
            if value is None
            else f"{value:.{digits}f}"
            if isinstance(value, int | float)
            else str(value)
        )
    return cells


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Put scores into the paper's tables, as Markdown and as JSON."""

    scores: list[str] = field(default_factory=list)
    """JSON files that evaluations wrote; a folder for understanding."""
    output: str = "runs/evaluation/results.md"
    """The tables; the same as JSON, with whole manifests, beside it."""

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("got no scores, expected scores=[FILE.json,…]")
        if Path(self.output).suffix != ".md":
            raise ValueError(
                f"got output={self.output}, expected a .md file: the JSON goes beside it"
            )


def main(argv: list[str] | None = None) -> None:
    config = parse(ResultsConfig, argv)
    scores = [read_score(path) for path in config.scores]
    output = Path(config.output)
    write_json(output.with_suffix(".json"), as_json(scores))
    write_text(output, markdown(scores))
    print(f"{len(scores)} rows of ours  ->  {output}")


if __name__ == "__main__":
    run_main(main)
