"""The papers' claims, measured here and judged by criteria that were stated before.

    python -m vqrae.quickstart.claims claims=[C1,C2] encoder=runs/encoder minutes=60

`configs/claims.yaml` says what is claimed, what measures it and what would confirm it. A claim is
measured by a suite of `vqrae.eval.ablations` or by a module whose result has `rows`
(`vqrae.eval.verdicts.Measurements`). The same command resumes: finished runs are not repeated, and
claims of earlier launches stay in claims.json and claims.md.
"""

import dataclasses
import importlib
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from vqrae.common.cli import parse
from vqrae.common.config import check_range, did_you_mean, load_config, shipped_config
from vqrae.common.errors import run_main
from vqrae.common.files import atomic_path, markdown_table, read_json, write_json, write_text
from vqrae.common.run import run_manifest
from vqrae.eval.ablations import evaluate as ablations
from vqrae.eval.ablations.suites import METRICS, Metric
from vqrae.eval.ablations.tables import measurements
from vqrae.eval.figures import ACCENT, INK, PAPER, RIGHT, SECOND, SOFT, STYLE, WRONG
from vqrae.eval.verdicts import (
    Claim,
    Effect,
    Measurements,
    Verdict,
    all_hold,
    difference_text,
    effect,
)

ALL_METRICS = METRICS | {
    "accuracy": Metric("questions answered", ".1%"),
    "loss": Metric("held-out loss, nats a code", ".3f"),
    "exponent": Metric("exponent of compute", ".3f"),
}
COLORS = {"confirmed": RIGHT, "refuted": WRONG, "undecided": SECOND}


@dataclass(frozen=True, kw_only=True)
class PublishedClaim:
    """What a paper says, and its test."""

    name: str
    title: str
    paper: str
    """Its words, or the numbers of its table."""
    place: str
    suite: str = ""
    """Of `vqrae.eval.ablations`. Where it has several recipes, a row is named RECIPE/ROW."""
    module: str = ""
    """Or a module that takes output= and seeds=."""
    arguments: tuple[str, ...] = ()
    """Its further ones; `{key}` is a value of `ClaimsConfig`."""
    result: str = ""
    """The file in its output that has `rows`."""
    criteria: tuple[Claim, ...]
    """All must hold."""
    also: tuple[Claim, ...] = ()
    """Comparisons that decide nothing."""


@dataclass(frozen=True, kw_only=True)
class ClaimList:
    """configs/claims.yaml."""

    claims: tuple[PublishedClaim, ...]


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """Measure the papers' claims with several seeds and judge them."""

    claims: tuple[str, ...] = ()
    """Names, such as C1; none: all."""
    source: str = "claims"
    """A shipped list of claims, or a YAML file."""
    output: str = "runs/claims"
    """Folder of all runs, claims.json, claims.md and a PNG for each claim."""
    encoder: str = "runs/encoder"
    """Pretrained encoder of the tokenizers that are trained here."""
    tokenizer: str = "runs/tokenizer"
    """Run directory that C5 and C6 start from."""
    llm: str = "runs/llm"
    """Language model of C5."""
    codes: str = "runs/codes"
    """Code shards of C6."""
    seeds: int = 3
    minutes: float = math.inf
    """No run begins after this time; what is there is judged, and the rest named as missing."""
    nproc: int = 1
    """Processes of each training."""

    def __post_init__(self) -> None:
        check_range(self, "seeds", "nproc", low=1)


def chosen_claims(config: ClaimsConfig) -> list[PublishedClaim]:
    """The claims to measure, in the order of the list; ValueError for an unknown name."""
    source = shipped_config("vqrae.quickstart", config.source)
    claims = {claim.name: claim for claim in load_config(ClaimList, source).claims}
    for name in config.claims:
        if name not in claims:
            raise ValueError(f"unknown claim {name!r}. {did_you_mean(name, claims)}")
    return [claim for name, claim in claims.items() if name in (config.claims or claims)]


# ---- measurements


def measure(claim: PublishedClaim, config: ClaimsConfig, end: float) -> Measurements:
    """Train and score what is missing, as far as time allows.

    Args:
        end: on the monotonic clock, in seconds.
    """
    if claim.suite:
        return measure_suite(claim.suite, config, max(0.0, end - time.monotonic()) / 60)
    module = importlib.import_module(claim.module)
    output = Path(config.output) / claim.name
    arguments = [argument.format_map(vars(config)) for argument in claim.arguments]
    arguments += [f"output={output}", f"nproc={config.nproc}"]
    for count in range(1, config.seeds + 1):  # one more each time; the earlier ones are kept
        if time.monotonic() < end:
            module.main([*arguments, f"seeds={list(range(count))}"])
    file = output / claim.result
    return read_json(file)["rows"] if file.is_file() else {}


def measure_suite(suite: str, config: ClaimsConfig, minutes: float) -> Measurements:
    """The numbers of a suite's rows."""
    output = Path(config.output) / "ablations"
    keys = {"suite": suite, "output": output, "encoder": config.encoder, "seeds": config.seeds}
    keys |= {"nproc": config.nproc, "minutes": minutes}
    ablations.main([f"{key}={value}" for key, value in keys.items()])
    results = read_json(output / f"{suite}.json")["rows"]
    recipes = list(dict.fromkeys(result["recipe"] for result in results))
    if len(recipes) == 1:
        return measurements(results, recipes[0])
    rows: dict[str, Mapping[str, Sequence[float]]] = {}
    for recipe in recipes:
        for name, values in measurements(results, recipe).items():
            rows[f"{recipe}/{name}"] = values
    return rows


def verdict(claim: PublishedClaim, rows: Measurements, config: ClaimsConfig) -> dict[str, Any]:
    """What is known of a claim, as claims.json holds it."""
    compared = []
    for number, comparison in enumerate((*claim.criteria, *claim.also)):
        found = {"effect": effect(comparison, rows), "decides": number < len(claim.criteria)}
        compared.append(dataclasses.asdict(comparison) | found)
    missing: dict[str, str] = {}
    for comparison in claim.criteria:
        for name in (comparison.higher, comparison.lower):
            count = len(rows.get(name, {}).get(comparison.metric, []))
            if count < config.seeds:
                missing[name] = f"{name} has {count} of {config.seeds} seeds"
    effects = [each["effect"] for each in compared if each["decides"]]
    decided: list[Verdict] = [found["verdict"] if found else "undecided" for found in effects]
    return {
        "title": claim.title,
        "paper": claim.paper,
        "place": claim.place,
        "command": f"bash scripts/claims.sh {claim.name}",
        "verdict": all_hold(decided),
        "comparisons": compared,
        "missing": list(missing.values()),
        "rows": rows,
        "manifest": run_manifest(),
    }


# ---- for people


def page(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """claims.md."""
    lines = ["# The papers' claims"]
    for name, found in claims.items():
        lines += ["", f"## {name}. {found['title']}: {found['verdict']}", ""]
        lines += [f"> {found['paper']} ({found['place']})", "", f"![{name}]({name}.png)", ""]
        lines += markdown_table(
            ["criterion", "compared by", "counts from", "difference, 95 % interval"],
            [comparison_cells(comparison) for comparison in found["comparisons"]],
        )
        lines += ["", f"`{found['command']}`"]
        if found["missing"]:
            lines += ["", f"Missing: {', '.join(found['missing'])}."]
    return "\n".join(lines) + "\n"


def comparison_cells(comparison: Mapping[str, Any]) -> list[str]:
    """One line of a claim's table."""
    metric = ALL_METRICS[comparison["metric"]]
    sign = "±" if comparison["kind"] == "equivalent" else ""
    margin = comparison["margin"]
    least = f"{sign}{difference_text(margin, metric.format)}" if margin else ""
    text = comparison["text"] if comparison["decides"] else f"({comparison['text']})"
    found = comparison["effect"]
    result = Effect(**found).text(metric.format) if found else "missing"
    return [text, metric.heading, least, result]


def draw(name: str, found: Mapping[str, Any], file: Path) -> None:
    """A panel for each metric of a claim: every seed's point, the mean, its 95 % interval."""
    metrics = list(dict.fromkeys(each["metric"] for each in found["comparisons"]))
    title = textwrap.fill(found["title"], 40 * len(metrics))  # what a panel is wide
    with matplotlib.rc_context(STYLE):
        size = (3.6 * len(metrics), 3.2)
        figure = Figure(figsize=size, dpi=110, facecolor=PAPER, layout="constrained")
        figure.suptitle(
            f"{name} {found['verdict']}\n{title}",
            fontsize=10.5,
            weight="bold",
            color=COLORS[found["verdict"]],
            x=0.02,
            ha="left",
        )
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            draw_metric(axes, metric, found["rows"])
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")


def draw_metric(axes: Axes, metric: str, rows: Measurements) -> None:
    """The rows that have a metric, from left to right."""
    measured = {name: values[metric] for name, values in rows.items() if values.get(metric)}
    for x, values in enumerate(measured.values()):
        offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
        axes.plot(x + np.asarray(offsets), values, "o", color=ACCENT, markersize=4, alpha=0.7)
        middle = float(np.mean(values))
        axes.plot([x - 0.25, x + 0.25], [middle, middle], color=INK, linewidth=1.2)
        if len(values) > 1 and np.ptp(values) > 0:
            half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
            axes.errorbar(x, middle, yerr=half, color=SOFT, linewidth=0.8, capsize=3)
    labels = [name.replace("/", "\n").replace("-", "\n") for name in measured]
    axes.set_xticks(range(len(measured)), labels, fontsize=8)
    axes.set_xlim(-0.6, len(measured) - 0.4)
    heading, spec = ALL_METRICS[metric][:2]
    axes.set_title(heading, fontsize=9, loc="left", color=SOFT)
    if spec.endswith("%"):
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(ClaimsConfig, argv)
    end = time.monotonic() + 60 * config.minutes
    output = Path(config.output)
    file = output / "claims.json"
    known = read_json(file) if file.is_file() else {}
    for claim in chosen_claims(config):
        known[claim.name] = verdict(claim, measure(claim, config, end), config)
        known = dict(sorted(known.items()))
        draw(claim.name, known[claim.name], output / f"{claim.name}.png")
        write_json(file, known)
        write_text(output / "claims.md", page(known))
    print(f"{page(known)}-> {output}")


if __name__ == "__main__":
    run_main(main)
