"""GenEval's scores from its result rows, with confidence intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

INTERVAL_METHOD = (
    "tasks: 95 % Wilson with prompts as trials, for images of one prompt are alike; "
    "overall: the tasks' intervals combined (MOVER)"
)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of result rows: share of correct images per task, and their unweighted mean as `overall`.

    Returns:
        overall, one score per tag in order of appearance, `correct_images` and `correct_prompts` (prompts with any correct
        image), num_images, num_prompts; `intervals`: 95 % bounds per tag and of `overall`, by `interval_method`. A prompt
        is a metadata string.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("got no results, expected at least one image")
    tasks: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        tasks.setdefault(row["tag"], {}).setdefault(row["metadata"], []).append(row["correct"])
    scores = {
        tag: float(np.mean([c for correct in prompts.values() for c in correct]))
        for tag, prompts in tasks.items()
    }
    every_prompt = [correct for prompts in tasks.values() for correct in prompts.values()]
    intervals = {
        tag: wilson_interval(scores[tag] * len(prompts), len(prompts))
        for tag, prompts in tasks.items()
    }
    return {
        "overall": float(np.mean(list(scores.values()))),
        **scores,
        "correct_images": float(np.mean([row["correct"] for row in rows])),
        "correct_prompts": float(np.mean([any(correct) for correct in every_prompt])),
        "num_images": len(rows),
        "num_prompts": len(every_prompt),
        "intervals": {
            "overall": mean_interval([(scores[tag], *intervals[tag]) for tag in tasks]),
            **intervals,
        },
        "interval_method": INTERVAL_METHOD,
    }


def wilson_interval(correct: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share from `correct` of `total` independent trials (Wilson 1927); z = 1.96 for 95 %."""
    share, spread = correct / total, z * z / total
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * float(np.sqrt(share * (1 - share) / total + spread / (4 * total)))
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(shares: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Bounds of the mean of independent shares (value, low, high), by MOVER (Zou and Donner 2008).

    Unlike a bootstrap it does not promise certainty where every task is all right or all wrong.
    """
    values, lows, highs = np.array(shares).T
    mean = float(values.mean())
    below, above = (
        float(np.linalg.norm(bounds - values)) / len(values) for bounds in (lows, highs)
    )
    return mean - below, mean + above
