"""The paper's result tables with our rows below, each with its manifest.

    python -m vqrae.eval.results.evaluate output=results.md \
        scores=[runs/evaluation/geneval/scores.json,runs/evaluation/dpg/scores.json]

Reads what the evaluations write: reconstruction, GenEval (also of scenes), DPG-Bench, and the folder
of understanding benchmarks with one JSON file each. A score that was not taken like the paper's says
so in its label and in its note.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from vqrae.common.cli import parse
from vqrae.common.config import parse_yaml
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, write_json, write_text
from vqrae.eval.tables import markdown_table

PAPER_IMAGES = 50_000  # ImageNet's validation images, of Table 2 (arXiv 2511.23386)
PAPER_SIZE, PAPER_PROTOCOL = 256, "titok"  # of Table 2, and appendix B.3
GENEVAL_IMAGES = 4  # of each prompt
DPG_PROMPTS = 1065

GENEVAL_COLUMNS = {
    "single_object": "Sgl",
    "two_object": "Two",
    "counting": "Cnt",
    "colors": "Col",
    "position": "Pos",
    "color_attr": "Attr",
    "overall": "GenEval",
}
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


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Put scores into the paper's tables, as Markdown and as JSON."""

    scores: list[str] = field(default_factory=list)
    """JSON files that evaluations wrote; a folder for understanding."""
    output: str = "runs/evaluation/results.md"
    """The tables; a JSON file with whole manifests is written next to it."""

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("got no scores, expected scores=[FILE.json,…]")
        if Path(self.output).suffix != ".md":
            raise ValueError(f"got output={self.output}, expected a .md file: JSON goes next to it")


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    columns: dict[str, int]
    """Digits of the numbers, by heading, the first column left out."""
    rows: list[list[float | str | None]]
    """The method, then a cell for each column."""


def paper_tables() -> dict[str, PaperTable]:
    """The paper's tables `reconstruction`, `understanding` and `generation`."""
    text = (resources.files("vqrae.eval.results") / "paper.yaml").read_text(encoding="utf-8")
    return {name: PaperTable(**values) for name, values in parse_yaml(text).items()}


# ---- our rows


@dataclass(frozen=True)
class Score:
    """A row of ours."""

    table: str
    """Name of the paper's table."""
    label: str
    values: dict[str, Any]
    """Cells by column."""
    reservations: list[str]
    """Why it does not compare with the paper's rows."""
    manifest: dict[str, Any]
    source: str


def read_score(path: str | Path) -> Score:
    """The row that an evaluation's output gives.

    Raises:
        ValueError: for any other file or folder.
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
        raise ValueError(f"{path} is not a score as an evaluation writes it: {error!r}") from error
    raise ValueError(
        f"{path} is not a score for a table: expected the JSON of reconstruction, GenEval or "
        "DPG-Bench, or the folder of understanding benchmarks"
    )


def _geneval(stored: dict[str, Any], source: str) -> Score:
    manifest = stored["manifest"]
    images, prompts = stored["num_images"], stored["num_prompts"]
    reservations = []
    if stored["benchmark"] != "GenEval":
        reservations.append(f"detector {manifest['detector']} instead of GenEval's")
    if manifest["suite"] != "official":
        reservations.append(f"prompts are suite {manifest['suite']}, not the official 553")
    if stored.get("incomplete"):
        reservations.append(f"{len(stored['incomplete'])} prompts lack images")
    elif images != GENEVAL_IMAGES * prompts:
        reservations.append(
            f"{images} images of {prompts} prompts, GenEval has {GENEVAL_IMAGES} of each"
        )
    leaked = stored.get("leakage", {}).get("normalized")
    if leaked:
        reservations.append(f"{leaked} prompts are among the training captions")
    values = {column: stored[key] for key, column in GENEVAL_COLUMNS.items() if key in stored}
    return Score("generation", stored["benchmark"], values, reservations, manifest, source)


def _dpg(stored: dict[str, Any], source: str) -> Score:
    manifest, prompts = stored["manifest"], stored["num_prompts"]
    reservations = []
    if "(mplug)" not in stored["benchmark"]:
        reservations.append(f"judge {manifest['judge']} instead of mPLUG")
    if manifest["questions"] == "scenes":
        reservations.append("prompts and questions are about embedded scenes")
    elif prompts != DPG_PROMPTS:
        reservations.append(f"{prompts} of DPG-Bench's {DPG_PROMPTS:,} prompts")
    if manifest["formulas"] == "corrected":
        reservations.append("categories by the corrected formulas, not by the published script")
    if lost := prompts - stored["num_scored"]:
        reservations.append(f"{lost} of {prompts} prompts are not scored")
    values = {column: stored["categories"].get(key) for key, column in DPG_COLUMNS.items()}
    values["DPG"] = stored["dpg"]
    return Score("generation", stored["benchmark"], values, reservations, manifest, source)


def _reconstruction(stored: dict[str, Any], source: str) -> Score:
    protocol, images = stored["protocol"], stored["num_images"]
    reservations = []
    if not (stored.get("imagenet_validation") and images == PAPER_IMAGES):
        reservations.append(
            f"{images} images of {stored['data']}, the paper: ImageNet's 50,000 of validation"
        )
    size = protocol.get("score_size") or stored.get("image_size")
    if size != PAPER_SIZE:
        reservations.append(f"compared at {size} px, the paper: at {PAPER_SIZE}")
    if protocol["name"] != PAPER_PROTOCOL:
        reservations.append(
            f"protocol {protocol['name']}, the paper: 1d-tokenizer's code, which "
            f"{PAPER_PROTOCOL} follows"
        )
    if reason := stored.get("not_measured", {}).get("rfid"):
        reservations.append(f"rFID not measured: {reason}")
    keys = ("tokenizer", "data", "split", "protocol", "image_size", "packages")
    return Score(
        "reconstruction",
        f"protocol {protocol['name']}",
        {"rFID": stored.get("rfid"), "PSNR": stored["psnr"], "SSIM": stored["ssim"]},
        reservations,
        {key: stored[key] for key in keys if key in stored},
        source,
    )


def _understanding(folder: Path) -> Score:
    values, reservations, manifest = {}, [], {}
    for name, column in UNDERSTANDING_COLUMNS.items():
        file = folder / f"{name}.json"
        stored = read_json(file) if file.is_file() else None
        if not isinstance(stored, dict) or not {"score", "manifest"} <= stored.keys():
            continue
        settings = stored.get("settings", {})
        values[column] = stored["score"]
        manifest[name] = {**stored["manifest"], **settings}
        if settings.get("limit"):
            reservations.append(f"{name}: at most {settings['limit']} questions, a trial")
    if not values:
        names = ", ".join(UNDERSTANDING_COLUMNS)
        raise ValueError(f"{folder} holds no scores: expected one of {names} as NAME.json")
    return Score("understanding", "lmms-eval", values, reservations, manifest, str(folder))


# ---- the tables


def tables_json(scores: Sequence[Score]) -> dict[str, Any]:
    """The tables that have rows of ours: title, columns, and rows of label, source and values.

    Ours also have reservations and their manifest.
    """
    tables = []
    for name, table in paper_tables().items():
        ours = [score for score in scores if score.table == name]
        rows: list[dict[str, Any]] = []
        for label, *cells in table.rows:
            values = dict(zip(table.columns, cells, strict=True))
            rows.append({"label": label, "source": "paper", "values": values})
        for score in ours:
            row = {"label": score.label, "source": score.source}
            values = {column: score.values.get(column) for column in table.columns}
            more = {"reservations": score.reservations, "manifest": score.manifest}
            rows.append({**row, "values": values, **more})
        if ours:
            tables.append({"title": table.title, "columns": list(table.columns), "rows": rows})
    return {"tables": tables}


def tables_markdown(scores: Sequence[Score]) -> str:
    """The same for people: our rows are numbered, and notes say what each number rests on."""
    lines = ["# Results next to the paper's", ""]
    for name, table in paper_tables().items():
        digits = table.columns.values()
        rows = []
        for label, *cells in table.rows:
            rows.append([str(label), *map(_format, cells, digits)])
        for number, score in enumerate(scores, start=1):
            if score.table == name:
                mark = " ≠" if score.reservations else ""
                label = f"**ours: {score.label}** [{number}]{mark}"
                cells = [score.values.get(column) for column in table.columns]
                rows.append([label, *map(_format, cells, digits)])
        if len(rows) > len(table.rows):
            header = ("method", *table.columns)
            lines += [f"## {table.title}", "", *markdown_table(header, rows), ""]
    if any(score.reservations for score in scores):
        lines += ["≠ was not taken like the paper's scores; the note says how it differs.", ""]
    for number, score in enumerate(scores, start=1):
        lines += [f"**[{number}]** `{score.source}`", ""]
        lines += [f"- ≠ {reservation}" for reservation in score.reservations]
        for key, value in score.manifest.items():
            if key not in ("packages", "command"):
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                lines.append(f"- {key}: `{text}`")
        lines.append("")
    return "\n".join(lines)


def _format(value: Any, digits: int) -> str:
    if value is None:
        return "—"
    return f"{value:.{digits}f}" if isinstance(value, int | float) else str(value)


def main(argv: list[str] | None = None) -> None:
    config = parse(ResultsConfig, argv)
    scores = [read_score(path) for path in config.scores]
    output = Path(config.output)
    write_json(output.with_suffix(".json"), tables_json(scores))
    write_text(output, tables_markdown(scores))
    print(f"{len(scores)} rows of ours  ->  {output}")


if __name__ == "__main__":
    run_main(main)
