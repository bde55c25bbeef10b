"""Results of an ablation suite: mean and half range over seeds, what became of the paper's claims, a page in Markdown."""

from collections.abc import Sequence
from typing import Any

from vqrae.eval.ablations.suites import METRICS, Claim, Suite
from vqrae.eval.tables import markdown_table

CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "not separable"


def mean_and_half_range(values: Sequence[float]) -> tuple[float, float]:
    """The mean of some seeds' numbers, and half the distance between the largest and the smallest."""
    return sum(values) / len(values), (max(values) - min(values)) / 2


def verdict(higher: Sequence[float], lower: Sequence[float], noise: float) -> str:
    """Whether a claim's order is what all seeds show.

    Args:
        higher, lower: the seeds' numbers of the two rows in the order that is claimed.
        noise: the metric's half range over seeds, mean over all rows of the suite. Two seeds may agree by chance, so
            rows count as different only when their ranges lie further apart than that.
    """
    if min(len(higher), len(lower)) < 2:
        return OPEN
    if min(higher) - max(lower) > noise:
        return CONFIRMED
    return REFUTED if min(lower) - max(higher) > noise else OPEN


def judge(claim: Claim, results: list[dict[str, Any]], recipe: str) -> str:
    """The verdict on a claim in a recipe, with both means; empty where one of the rows was not run."""
    found = {
        result["row"]: numbers(result, claim.metric)
        for result in results
        if result["recipe"] == recipe
    }
    higher, lower = (found.get(name, []) for name in (claim.higher, claim.lower))
    if not higher or not lower:
        return ""
    spreads = [
        mean_and_half_range(values)[1]
        for result in results
        if (values := numbers(result, claim.metric))
    ]
    means = " : ".join(
        format(mean_and_half_range(values)[0], METRICS[claim.metric].format)
        for values in (higher, lower)
    )
    return f"{verdict(higher, lower, sum(spreads) / len(spreads))} ({means})"


def numbers(result: dict[str, Any], metric: str) -> list[float]:
    """A row's values of a metric, one for each seed that has it."""
    return [
        run["metrics"][metric] for run in result["runs"] if run["metrics"].get(metric) is not None
    ]


def cell(result: dict[str, Any], metric: str) -> str:
    """`mean ± half range` of a row, and what became of seeds that have no number."""
    values, missing = (
        numbers(result, metric),
        sum("diverged" in run["metrics"] for run in result["runs"]),
    )
    if not values:
        return "diverged" if missing else "not measured" if result["runs"] else ""
    spec = METRICS[metric].format
    mean, half_range = mean_and_half_range(values)
    text = (
        format(mean, spec)
        if len(values) == 1
        else f"{format(mean, spec)} ± {format(half_range, spec)}"
    )
    return f"{text} ({missing} diverged)" if missing else text


def markdown(values: dict[str, Any], suite: Suite) -> str:
    """The page of a suite: its table, its claims, and what was measured how.

    Args:
        values: what `vqrae.eval.ablations.evaluate` writes as JSON.
    """
    labels = list(dict.fromkeys(label for row in suite.rows for label in row.labels))
    papers = any(row.paper for row in suite.rows)
    recipes = len(suite.recipes) > 1
    header = [*(["recipe"] if recipes else []), *labels]
    header += [
        values["frechet"] if name == "frechet" else METRICS[name].heading for name in suite.columns
    ]
    rows = []
    for (recipe, row), result in zip(suite.trials(), values["rows"], strict=True):
        shown = [
            *([recipe.name] if recipes else []),
            *(str(row.labels.get(label, "")) for label in labels),
        ]
        shown += [cell(result, name) for name in suite.columns]
        rows.append(shown + ([row.paper] if papers else []))
    if reference := values["original_features"]:
        first = ["original encoder", *[""] * (len(header) - len(suite.columns) - 1)]
        shown = [
            format(reference[name], METRICS[name].format) if name in reference else ""
            for name in suite.columns
        ]
        rows.insert(0, first + shown + ([""] if papers else []))
    lines = [
        f"# {suite.title}",
        "",
        *markdown_table(header + (["the paper"] if papers else []), rows),
        "",
    ]
    lines += [
        f"- {note}"
        for note in [
            *values["notes"],
            *(f"`{recipe.name}`: {recipe.note}" for recipe in suite.recipes),
        ]
    ]
    if suite.claims:
        heading = [
            "what the paper finds",
            "compared by",
            *(f"in `{recipe.name}`" for recipe in suite.recipes),
        ]
        verdicts = [
            [claim["text"], METRICS[claim["metric"]].heading, *claim["verdicts"].values()]
            for claim in values["claims"]
        ]
        lines += ["", *markdown_table(heading, verdicts)]
    return "\n".join(lines) + "\n"
