"""Verdicts on claims: Welch's interval, and on which side of the criterion it lies."""

import math

import pytest
from scipy import stats

from vqrae.eval.verdicts import Claim, all_hold, judge, welch_interval


def claim(**changes: object) -> Claim:
    return Claim(**{"text": "t", "metric": "psnr", "higher": "a", "lower": "b", **changes})


def test_the_interval_is_that_of_the_formula() -> None:
    first, second = [20.0, 20.4, 20.1], [19.0, 19.8]
    # Welch (1947): squared errors of the means 0.043333/3 and 0.32/2, degrees of freedom by
    # Satterthwaite.
    errors = [0.13 / 3 / 3, 0.32 / 2]
    degrees = sum(errors) ** 2 / (errors[0] ** 2 / 2 + errors[1] ** 2 / 1)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(sum(errors))
    difference = 60.5 / 3 - 19.4
    assert welch_interval(first, second) == pytest.approx((difference - half, difference + half))


def test_seeds_that_agree_exactly_have_an_interval() -> None:
    assert welch_interval([1.0, 1.0], [0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_a_claim_is_decided_where_the_whole_interval_is_on_one_side() -> None:
    high, low = [20.0, 20.1, 20.2], [19.0, 19.1, 19.2]
    assert judge(claim(), high, low).verdict == "confirmed"
    assert judge(claim(), low, high).verdict == "refuted"
    assert judge(claim(), high, [20.05, 20.15, 20.25]).verdict == "undecided"
    assert judge(claim(), high[:1], low).text(".1f") == "undecided (+0.9, too few seeds)"
    assert judge(claim(margin=0.5), high, low).verdict == "confirmed"
    assert judge(claim(margin=1.5), high, low).verdict == "refuted"  # higher, but by too little
    assert judge(claim(margin=1.1), high, low).verdict == "undecided"
    assert judge(claim(), high, low).text(".2f") == "confirmed (+1.00, 0.77 to 1.23)"
    shares = judge(claim(), [0.5, 0.5], [0.4, 0.4])
    assert shares.text(".1%") == "confirmed (+10.0 points, 10.0 to 10.0 points)"


def test_equality_is_shown_by_an_interval_within_the_margin() -> None:
    first, near = [20.0, 20.1, 20.2], [20.05, 20.1, 20.15]
    equal = claim(kind="equivalent", margin=0.5)
    assert judge(equal, first, near).verdict == "confirmed"
    assert judge(equal, first, [22.0, 22.1, 22.2]).verdict == "refuted"
    assert judge(equal, [22.0, 22.1, 22.2], first).verdict == "refuted"
    assert judge(claim(kind="equivalent", margin=0.1), first, near).verdict == "undecided"
    with pytest.raises(ValueError, match="margin: got 0 for an equivalence"):
        claim(kind="equivalent")


def test_all_criteria_of_a_claim_must_hold() -> None:
    assert all_hold(["confirmed", "confirmed"]) == "confirmed"
    assert all_hold(["confirmed", "undecided"]) == "undecided"
    assert all_hold(["undecided", "refuted"]) == "refuted"
    assert all_hold([]) == "undecided"
