"""The quickstart's report: what the run reached, beside what it was expected to reach, with its images.

    python -m vqrae.quickstart.report directory=runs/quickstart

Reads what the steps left (`report_evidence.py`) and writes report.json, report.png (one sheet for a README) and report.html
(one self-contained page). Examples are always the first ones, never chosen. A step that has not run is said to be missing.
"""

from dataclasses import dataclass
from pathlib import Path

from vqrae.common.cli import parse
from vqrae.common.errors import run_main
from vqrae.common.files import write_json, write_text
from vqrae.common.images import save_image
from vqrae.common.run import quiet_libraries
from vqrae.quickstart.evidence import Evidence, Row, figure_rows, report_values
from vqrae.quickstart.figures import summary_image
from vqrae.quickstart.page import render_page


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the report of a quickstart run: report.json, report.png and report.html in its folder."""

    directory: str = "runs/quickstart"
    """The run's folder."""
    num_scenes: int = 12
    """Validation scenes that are shown reconstructed."""
    prompts_per_family: int = 4
    """Prompts of each family that are shown with their images."""

    def __post_init__(self) -> None:
        if self.num_scenes < 1 or self.prompts_per_family < 1:
            raise ValueError(
                f"got num_scenes={self.num_scenes}, prompts_per_family={self.prompts_per_family}, expected both positive"
            )


def write_report(config: ReportConfig) -> list[Row]:
    """Write the three files, each whole or not at all; returns the table of figures.

    Raises:
        ValueError: when the folder holds no quickstart run.
    """
    directory = Path(config.directory)
    evidence = Evidence(directory)
    values = report_values(evidence)
    rows = figure_rows(values, evidence.budget)
    pairs = evidence.reconstructions(config.num_scenes)
    asked = evidence.asked()
    prompts = evidence.prompts(config.prompts_per_family)
    write_json(directory / "report.json", values)
    save_image(summary_image(evidence, rows, pairs, prompts), directory / "report.png")
    write_text(
        directory / "report.html", render_page(evidence, values, rows, pairs, asked, prompts)
    )
    return rows


def main(argv: list[str] | None = None) -> None:
    config = parse(ReportConfig, argv)
    quiet_libraries()
    for row in write_report(config):
        mark = {True: "met", False: "below", None: ""}[row.met]
        print(f"{row.label:<28}{row.value:>10}  {mark}")
    print(f"report: {Path(config.directory) / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
