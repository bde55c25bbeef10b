"""What seeds say of a claim: an effect with its interval, and a verdict.

A claim compares a metric of two rows, each trained with several seeds. Its criterion is stated
before the measurement. The effect is the difference of means with Welch's 95 % interval, which
needs two seeds of each row and no equal variances.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from vqrae.common.config import check_range

Verdict = Literal["confirmed", "refuted", "undecided"]
Measurements = Mapping[str, Mapping[str, Sequence[float]]]
"""Row -> metric -> a number of each seed: what a module that measures a claim writes as `rows`."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A comparison of two rows, and what counts as its confirmation."""

    text: str
    metric: str
    higher: str
    """Name of the row whose metric is the larger number."""
    lower: str
    kind: Literal["higher", "equivalent"] = "higher"
    """`higher`: the first row exceeds the second by more than `margin`; `equivalent`: they differ
    by less than `margin`."""
    margin: float = 0.0
    """The smallest difference that counts, in units of the metric."""

    def __post_init__(self) -> None:
        check_range(self, "margin", low=0)
        if self.kind == "equivalent" and not self.margin:
            raise ValueError("margin: got 0 for an equivalence, expected the largest difference")


@dataclass(frozen=True)
class Effect:
    """The difference of two means."""

    difference: float
    low: float | None
    """Of the 95 % interval, as `high`; both are None with fewer than two seeds of a row."""
    high: float | None
    verdict: Verdict

    def text(self, spec: str) -> str:
        """`confirmed (+0.52, 0.31 to 0.73)`, with numbers by the format `spec`, such as `.2f`."""
        difference = difference_text(self.difference, f"+{spec}")
        if self.low is None or self.high is None:
            return f"{self.verdict} ({difference}, too few seeds)"
        low = difference_text(self.low, spec).removesuffix(" points")
        return f"{self.verdict} ({difference}, {low} to {difference_text(self.high, spec)})"


def difference_text(value: float, spec: str) -> str:
    """A difference by a format; that of two percentages is one of points: `+3.1 points`."""
    if spec.endswith("%"):
        return f"{100 * value:{spec[:-1]}f} points"
    return f"{value:{spec}}"


def welch_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of mean(first) - mean(second), of two or more numbers each."""
    if np.ptp(first) == 0 and np.ptp(second) == 0:  # no spread at all, where Welch divides by 0
        difference = float(np.mean(first) - np.mean(second))
        return difference, difference
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def judge(claim: Claim, first: Sequence[float], second: Sequence[float]) -> Effect:
    """The verdict on a claim from the seeds' numbers of its two rows.

    It is confirmed or refuted where the whole interval is on one side of the criterion.

    Raises:
        ValueError: for a row without numbers.
    """
    if not (first and second):
        raise ValueError(f"{claim.text}: expected numbers of {claim.higher} and {claim.lower}")
    difference = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return Effect(difference, None, None, "undecided")
    low, high = welch_interval(first, second)
    if claim.kind == "higher":
        confirmed, refuted = low > claim.margin, high < claim.margin
    else:
        confirmed = -claim.margin < low and high < claim.margin
        refuted = low > claim.margin or high < -claim.margin
    verdict: Verdict = "confirmed" if confirmed else "refuted" if refuted else "undecided"
    return Effect(difference, low, high, verdict)


def all_hold(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim with several criteria, all of which must hold."""
    found = set(verdicts)
    if "refuted" in found:
        return "refuted"
    return "confirmed" if found == {"confirmed"} else "undecided"


def effect(claim: Claim, rows: Measurements) -> dict[str, Any] | None:
    """The fields of the claim's `Effect`, as results hold them; None where a row has no number."""
    sides = [rows.get(name, {}).get(claim.metric, []) for name in (claim.higher, claim.lower)]
    return dataclasses.asdict(judge(claim, *sides)) if all(sides) else None
