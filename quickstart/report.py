"""The quickstart's report: what the run reached, next to what was expected, with its images.

    python -m vqrae.quickstart.report directory=runs/quickstart

Reads what the steps left (evidence.py) and writes report.json, report.png (one sheet for a README,
figures.py) and report.html (one self-contained page, report.html.jinja). Examples are always the
first ones, never chosen. A step that has not run is reported as missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.errors import run_main
from vqrae.common.files import write_json, write_text
from vqrae.common.images import data_uri, save_image
from vqrae.common.run import format_duration, quiet_libraries
from vqrae.data.scenes.scene import is_held_out
from vqrae.quickstart.evidence import (
    BUDGETS,
    Evidence,
    FigureRow,
    Prompt,
    Reconstructions,
    count_codes,
    figure_rows,
    read_evidence,
    read_prompts,
    read_report,
    reconstruct_scenes,
    report_values,
)
from vqrae.quickstart.figures import curve_svg, summary_image, usage_svg
from vqrae.quickstart.scene_questions import is_correct
from vqrae.quickstart.systems import SYSTEMS


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.json, report.png and report.html into the folder of a quickstart run."""

    directory: str = "runs/quickstart"
    """The run's folder."""
    compare: str | None = "runs/quickstart_unitok"
    """Folder of another system's run, whose figures are shown next to these where it exists."""
    num_scenes: int = 12
    """Validation scenes that are shown reconstructed."""
    prompts_per_family: int = 4
    """Prompts of each family that are shown with their images."""

    def __post_init__(self) -> None:
        check_range(self, "num_scenes", "prompts_per_family", low=1)


def write_report(config: ReportConfig) -> list[FigureRow]:
    """Write the three files, each whole or not at all; returns the table of figures.

    Raises:
        ValueError: when the folder holds no quickstart run.
    """
    evidence = read_evidence(config.directory)
    values = report_values(evidence)
    other = read_report(config.compare)
    rows = figure_rows(values, evidence.budget, other)
    pairs = reconstruct_scenes(evidence, config.num_scenes)
    prompts = read_prompts(evidence, config.prompts_per_family)
    write_json(evidence.directory / "report.json", values)
    sheet = summary_image(evidence, rows, pairs, prompts)
    save_image(sheet, evidence.directory / "report.png")
    page = render_page(evidence, values, rows, pairs, prompts, other)
    write_text(evidence.directory / "report.html", page)
    return rows


def render_page(
    evidence: Evidence,
    values: dict[str, Any],
    rows: Sequence[FigureRow],
    pairs: Reconstructions | None,
    prompts: dict[str, list[Prompt]],
    other: dict[str, Any],
) -> str:
    """The page.

    Args:
        values: content of `report.json`.
        rows: the table of figures.
        pairs, prompts: the examples that are shown.
        other: the `report.json` of another system's run; empty without one.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"uri": data_uri, "duration": format_duration}
    environment.globals["zip"] = zip
    template = resources.files("vqrae.quickstart") / "report.html.jinja"
    scenes = evidence.scenes
    asked: dict[int, list[dict[str, Any]]] = {}
    for example in (evidence.questions or {}).get("examples", []):
        right = is_correct(example["answer"], example["expected"])
        asked.setdefault(example["index"], []).append({**example, "right": right})
    questions = [(i, scenes.image(i).float() / 255, answers) for i, answers in asked.items()]
    shown = {*asked, *range(len(pairs.originals) if pairs else 0)}
    held_out = {index for index in shown if is_held_out(scenes.scene(index))}
    counts = count_codes(evidence)
    charts = []
    for i, curve in enumerate(evidence.system.curves):
        steps, history = evidence.curve(curve)
        if steps:
            charts.append((curve, history[-1], curve_svg(f"curve{i}", steps, history)))
    look = resources.files("vqrae.eval") / "look.css"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        look=look.read_text(encoding="utf-8"),
        plan={"minutes": BUDGETS[0], "sprites": "shapes", "system": "vqrae", **evidence.plan},
        system=evidence.system,
        other=SYSTEMS[other["plan"].get("system", "vqrae")] if other else None,
        budgets=BUDGETS,
        budget=evidence.budget,
        rows=rows,
        pairs=pairs,
        held_out=held_out,
        counts=None if counts is None else sorted(counts.tolist(), reverse=True),
        usage="" if counts is None else usage_svg(counts),
        understanding=values.get("understanding"),
        asked=questions,
        generation=values.get("generation"),
        prompts=prompts,
        charts=charts,
        seconds=evidence.seconds,
        manifests=evidence.manifests,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(ReportConfig, argv)
    quiet_libraries()
    for row in write_report(config):
        mark = {True: "met", False: "below", None: ""}[row.met]
        print(f"{row.label:<28}{row.value:>10}  {mark}")
    print(f"report: {Path(config.directory) / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
