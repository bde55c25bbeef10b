"""The paper's result tables with our rows below, each with its manifest.

    python -m vqrae.eval.results.evaluate output=results.md \
        scores=[runs/evaluation/geneval/scores.json,runs/evaluation/dpg/scores.json]

Reads what the evaluations write: reconstruction, GenEval (also of scenes), DPG-Bench, and the
folder of understanding benchmarks with one JSON file each. A score that was not taken like the
paper's says so in its label and in its note.
"""

import functools
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from vqrae.common.cli import parse
from vqrae.common.config import parse_yaml
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, read_json, write_json, write_text

PAPER_IMAGES = 50_000  # ImageNet's validation images, of Table 2 (arXiv 2511.23386)
PAPER_SIZE, PAPER_PROTOCOL = 256, "titok"  # of Table 2, and appendix B.3
GENEVAL_IMAGES = 4  # of each prompt
DPG_PROMPTS = 1065


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
    keys: dict[str, str]
    """Columns by the keys of our scores."""
    columns: dict[str, int]
    """Digits of the numbers, by heading, the first column left out."""
    rows: list[list[float | str | None]]
    """The method, then a cell for each column."""


@functools.cache
def paper_tables() -> dict[str, PaperTable]:
    """The papers' tables `reconstruction`, `understanding`, `generation` and `zero_shot`."""
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
    """By the table's keys."""
    reservations: list[str]
    """Why it does not compare with the paper's rows."""
    manifest: dict[str, Any]


def read_score(path: str | Path) -> Score:
    """The row that an evaluation's output gives. Raises ValueError for any other file or folder."""
    path = Path(path)
    if path.is_dir():
        return _understanding(path)
    stored = read_json(path)
    try:
        if "dpg" in stored:
            return _dpg(stored)
        if str(stored.get("benchmark", "")).split("-")[0] == "GenEval":
            return _geneval(stored)
        if "psnr" in stored and "protocol" in stored:
            return _reconstruction(stored)
        if stored.get("benchmark") == "zero-shot":
            return _zero_shot(stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a score as an evaluation writes it: {error!r}") from error
    raise ValueError(
        f"{path} is not a score for a table: expected the JSON of reconstruction, zero-shot, "
        "GenEval or DPG-Bench, or the folder of understanding benchmarks"
    )


def _geneval(stored: dict[str, Any]) -> Score:
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
    return Score("generation", stored["benchmark"], stored, reservations, manifest)


def _dpg(stored: dict[str, Any]) -> Score:
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
    values = {**stored["categories"], "dpg": stored["dpg"]}
    return Score("generation", stored["benchmark"], values, reservations, manifest)


def _reconstruction(stored: dict[str, Any]) -> Score:
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
            f"protocol {protocol['name']}, the paper: 1d-tokenizer's, that is {PAPER_PROTOCOL}"
        )
    if reason := stored.get("not_measured", {}).get("rfid"):
        reservations.append(f"rFID not measured: {reason}")
    keys = ("tokenizer", "data", "split", "protocol", "image_size", "packages")
    manifest = {key: stored[key] for key in keys if key in stored}
    label = f"protocol {protocol['name']}"
    return Score("reconstruction", label, stored, reservations, manifest)


def _zero_shot(stored: dict[str, Any]) -> Score:
    """Top-1 accuracy of the last stage, in the first of the tasks that have one."""
    stage, scores = list(stored["stages"].items())[-1]
    task = next(name for name, found in scores["continuous"].items() if "top1" in found)
    values = {}
    for kind in ("continuous", "quantized"):
        values[kind] = 100 * scores[kind][task]["top1"]
    images = stored["tasks"][task]["count"]
    reservations = []
    if (task, images) != ("class", PAPER_IMAGES):
        reservations.append(f"{task} of {images} images of {stored['data']}, the paper: ImageNet")
    keys = ("data", "text_side", "packages")
    manifest = {"tokenizer": scores["tokenizer"]} | {key: stored[key] for key in keys}
    return Score("zero_shot", f"zero-shot, {stage}", values, reservations, manifest)


def _understanding(folder: Path) -> Score:
    values: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    reservations = []
    names = paper_tables()["understanding"].keys
    for name in names:
        file = folder / f"{name}.json"
        if file.is_file():
            stored = read_json(file)
            settings = stored.get("settings", {})
            values[name] = stored["score"]
            manifest[name] = {**stored["manifest"], **settings}
            if settings.get("limit"):
                reservations.append(f"{name}: at most {settings['limit']} questions, a trial")
    if not values:
        raise ValueError(
            f"{folder} holds no scores: expected one of {', '.join(names)} as NAME.json"
        )
    return Score("understanding", "lmms-eval", values, reservations, manifest)


# ---- the tables


def fill_tables(scores: dict[str, Score]) -> dict[str, Any]:
    """The tables that have rows of ours: title, columns with digits, and rows.

    A row has a label, its source and values by column; ours also have reservations and a manifest.
    `scores` are by their source.
    """
    tables = []
    for name, table in paper_tables().items():
        rows: list[dict[str, Any]] = []
        for label, *cells in table.rows:
            values = dict(zip(table.columns, cells, strict=True))
            rows.append({"label": label, "source": "paper", "values": values})
        for source, score in scores.items():
            if score.table == name:
                values = dict.fromkeys(table.columns)
                for key, column in table.keys.items():
                    values[column] = score.values.get(key)
                more = {"reservations": score.reservations, "manifest": score.manifest}
                rows.append({"label": score.label, "source": source, "values": values, **more})
        if len(rows) > len(table.rows):
            tables.append({"title": table.title, "columns": list(table.columns), "rows": rows})
    return {"tables": tables}


def result_tables(tables: list[dict[str, Any]]) -> str:
    """Tables and, for each row of ours, a note of what it rests on."""
    digits: dict[str, int] = {}
    for paper in paper_tables().values():
        digits |= paper.columns
    lines = ["# Results next to the paper's", ""]
    notes: list[str] = []
    number = 0
    for table in tables:
        rows = []
        for row in table["rows"]:
            label = row["label"]
            if row["source"] != "paper":
                number += 1
                mark = " ≠" if row["reservations"] else ""
                label = f"**ours: {label}** [{number}]{mark}"
                notes += [f"**[{number}]** `{row['source']}`", ""]
                notes += [f"- ≠ {reservation}" for reservation in row["reservations"]]
                for key, value in row["manifest"].items():
                    if key not in ("packages", "command"):
                        notes.append(f"- {key}: `{_text(value)}`")
                notes.append("")
            cells = [_cell(value, digits[column]) for column, value in row["values"].items()]
            rows.append([label, *cells])
        header = ("method", *table["columns"])
        lines += [f"## {table['title']}", "", *markdown_table(header, rows), ""]
    lines += ["≠ was not taken like the paper's scores; the note says how it differs.", ""]
    return "\n".join(lines + notes)


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "—"
    return f"{value:.{digits}f}" if isinstance(value, int | float) else str(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def main(argv: list[str] | None = None) -> None:
    config = parse(ResultsConfig, argv)
    filled = fill_tables({path: read_score(path) for path in config.scores})
    output = Path(config.output)
    write_json(output.with_suffix(".json"), filled)
    write_text(output, result_tables(filled["tables"]))
    print(f"{len(config.scores)} rows of ours  ->  {output}")


if __name__ == "__main__":
    run_main(main)
