"""Soft-TIFA, the scores of GenEval 2 (arXiv 2512.16853), from a judge's probabilities.

An atom scores the probability that its question is answered right. AM, the arithmetic mean of a
prompt's atoms, says how much of it is there; GM, their geometric mean, whether all of it is. Both
are means over prompts, x 100. A skill scores the mean of its atoms, an atom count the mean GM of
its prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import gmean

from vqrae.eval.geneval.rules import wilson_interval
from vqrae.eval.geneval2.prompts import SKILLS, GenEval2Item

INTERVAL_METHOD = "95 % Wilson, with as many trials as prompts, as clusters of atoms, are worth"


def summarize(
    items: Sequence[GenEval2Item], scores: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Scores over the prompts that have them; `scores` are those of the atoms by item id.

    Returns `soft_tifa_gm` and `soft_tifa_am`, 0 to 100, with `intervals`; `skills` and
    `atom_counts`, where each has score, interval, and `number`, of atoms or of prompts;
    num_prompts, num_scored. Raises ValueError when no prompt has scores.
    """
    scored = [item for item in items if item.id in scores]
    if not scored:
        raise ValueError(f"none of {len(items)} prompts could be scored")
    geometric = {item.id: [float(gmean(scores[item.id]))] for item in scored}
    arithmetic = [[float(np.mean(scores[item.id]))] for item in scored]
    overall = {"soft_tifa_gm": _mean(list(geometric.values())), "soft_tifa_am": _mean(arithmetic)}
    skills = {}
    for skill in SKILLS:
        clusters = [_of_skill(item, scores[item.id], skill) for item in scored]
        if any(clusters):
            skills[skill] = _mean(clusters)
    atom_counts = {}
    for count in sorted({item.atom_count for item in scored}):
        alike = [geometric[item.id] for item in scored if item.atom_count == count]
        atom_counts[str(count)] = _mean(alike)
    intervals = {name: value["interval"] for name, value in overall.items()}
    return {
        **{name: value["score"] for name, value in overall.items()},
        "intervals": intervals,
        "interval_method": INTERVAL_METHOD,
        "skills": skills,
        "atom_counts": atom_counts,
        "num_prompts": len(items),
        "num_scored": len(scored),
    }


def _of_skill(item: GenEval2Item, scores: Sequence[float], skill: str) -> list[float]:
    pairs = zip(item.atoms, scores, strict=True)
    return [score for atom, score in pairs if atom.skill == skill]


def _mean(clusters: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The mean of all values, x 100, and its interval: values of one cluster are not independent.

    The variance is that of a ratio of two sums over clusters (Cochran, Sampling Techniques, 6.4);
    it says how many independent trials would be as uncertain. Without any, those are the clusters.
    """
    filled = [cluster for cluster in clusters if cluster]
    sums = np.array([sum(cluster) for cluster in filled])
    sizes = np.array([len(cluster) for cluster in filled])
    mean, count = float(sums.sum() / sizes.sum()), len(filled)
    trials, squares = float(count), float(np.square(sums - mean * sizes).sum())
    if count > 1 and squares > 0:
        trials = mean * (1 - mean) * float(sizes.sum()) ** 2 * (count - 1) / (count * squares)
    low, high = wilson_interval(mean * trials, trials)
    return {"score": 100 * mean, "interval": (100 * low, 100 * high), "number": int(sizes.sum())}
