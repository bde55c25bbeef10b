"""The table of a suite: mean and half range over seeds, and verdicts on claims."""

from collections.abc import Sequence
from typing import Any

from vqrae.common.files import markdown_table
from vqrae.eval.ablations.suites import METRICS, Suite
from vqrae.eval.verdicts import Effect, Measurements

Result = dict[str, Any]
"""One row in one recipe: recipe, row, labels, paper, and runs of seed and metrics."""


def numbers(result: Result, metric: str) -> list[float]:
    """A row's values of a metric, one for each seed that has it."""
    values = [run["metrics"].get(metric) for run in result["runs"]]
    return [value for value in values if value is not None]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def half_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2


def measurements(results: Sequence[Result], recipe: str) -> Measurements:
    """The numbers of a recipe's rows, by row and metric."""
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if result["recipe"] == recipe:
            rows[result["row"]] = {metric: numbers(result, metric) for metric in METRICS}
    return rows


def cell(result: Result, metric: str) -> str:
    """`mean ± half range` of a row, and what became of seeds that have no number."""
    values = numbers(result, metric)
    diverged = sum("diverged" in run["metrics"] for run in result["runs"])
    spec = METRICS[metric].format
    if not values:
        missing = "not measured" if result["runs"] else ""
        return "diverged" if diverged else missing
    text = f"{mean(values):{spec}}"
    if len(values) > 1:
        text += f" ± {half_range(values):{spec}}"
    return f"{text} ({diverged} diverged)" if diverged else text


def ablation_table(values: dict[str, Any], suite: Suite) -> str:
    """The page of a suite: its table, what was measured how, and its claims.

    Args:
        values: what `vqrae.eval.ablations.evaluate` writes as JSON.
    """
    lines = [f"# {suite.title}", "", *result_table(values, suite), ""]
    lines += [f"- {note}" for note in values["notes"]]
    lines += [f"- `{recipe.name}`: {recipe.note}" for recipe in suite.recipes]
    if suite.claims:
        header = ["claim", "compared by"]
        header += [f"in `{recipe.name}`" for recipe in suite.recipes]
        rows = []
        for claim in values["claims"]:
            metric = METRICS[claim["metric"]]
            effects = [found and Effect(**found) for found in claim["effects"].values()]
            cells = [effect.text(metric.format) if effect else "" for effect in effects]
            rows.append([claim["text"], metric.heading, *cells])
        lines += ["", *markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


def result_table(values: dict[str, Any], suite: Suite) -> list[str]:
    """A line for each row and recipe, after one for the original encoder."""
    labels: dict[str, None] = {}
    for row in suite.rows:
        labels |= dict.fromkeys(row.labels)
    headings = [METRICS[name].heading for name in suite.columns]
    if "frechet" in suite.columns:
        headings[suite.columns.index("frechet")] = values["frechet"]
    rows = []
    for result in values["rows"]:
        named = [str(result["labels"].get(label, "")) for label in labels]
        cells = [cell(result, name) for name in suite.columns]
        rows.append([result["recipe"], *named, *cells, result["paper"]])

    first = 0 if len(suite.recipes) > 1 else 1  # a single recipe needs no column
    if reference := values["original_features"]:
        run = {"metrics": reference}
        cells = [cell({"runs": [run]}, name) if name in reference else "" for name in suite.columns]
        blanks = [""] * (1 + len(labels))
        blanks[first] = "original encoder"
        rows.insert(0, [*blanks, *cells, ""])
    last = None if any(row[-1] for row in rows) else -1
    header = ["recipe", *labels, *headings, "the paper"][first:last]
    return markdown_table(header, [row[first:last] for row in rows])
