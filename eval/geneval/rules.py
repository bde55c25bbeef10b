"""GenEval's scoring rules (Ghosh et al., arXiv 2310.11513; MIT), from detections to scores.

The rules are those of the official `evaluate_images.py` and `summary_scores.py`, edge cases
included: the same detections give the same verdicts, reasons and numbers. Detector and colour
classifier are arguments, so quote every score with the detector's name."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MAX_OBJECTS = 16  # per class and image
POSITION_MARGIN = 0.1  # share of both objects' extents that an offset must exceed to count
POSITION_THRESHOLD = 0.5  # of the offset's length
INTERVAL_METHOD = (
    "tasks: 95 % Wilson with prompts as trials, for images of one prompt are alike; "
    "overall: the tasks' intervals combined (MOVER)"
)

Record = dict[str, Any]
"""GenEval's metadata of a prompt: tag, include, [exclude,] prompt."""
Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels."""


@dataclass(frozen=True)
class Detection:
    """One detected object; `mask` (H, W), where there is one, is for the colour classifier."""

    name: str
    score: float
    box: Box
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects; they count above `threshold`, in the counting task `counting_threshold`."""

    name: str
    threshold: float
    counting_threshold: float

    def detect(self, image: Image.Image) -> list[Detection]:
        """All objects in an RGB image, in any order, uncertain ones included."""


class ColorClassifier(Protocol):
    """Names the colour of detected objects, one of GenEval's ten."""

    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        """One colour per detection; all of them are of `class_name`."""


# ---- one image


def confident_objects(
    detections: Iterable[Detection], threshold: float
) -> dict[str, list[Detection]]:
    """Detections above the threshold by class, best first, at most `MAX_OBJECTS` of each."""
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        if detection.score > threshold:
            objects.setdefault(detection.name, []).append(detection)
    return {name: found[:MAX_OBJECTS] for name, found in objects.items()}


def relative_position(a: Box, b: Box) -> set[str]:
    """Where box `a` is as seen from `b`: up to two of left of, right of, above, below."""
    corners_a = np.array(a, dtype=float).reshape(2, 2)
    corners_b = np.array(b, dtype=float).reshape(2, 2)
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    extents = np.abs(corners_a[1] - corners_a[0]) + np.abs(corners_b[1] - corners_b[0])
    revised = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_MARGIN * extents, 0)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    # Divided by the length of the offset itself, as the official code does, not of the revised one.
    dx, dy = revised / np.linalg.norm(offset)
    holds = {
        "left of": dx < -POSITION_THRESHOLD,
        "right of": dx > POSITION_THRESHOLD,
        "above": dy < -POSITION_THRESHOLD,
        "below": dy > POSITION_THRESHOLD,
    }
    return {relation for relation, true in holds.items() if true}


def judge(
    image: Image.Image,
    objects: dict[str, list[Detection]],
    record: Record,
    classifier: ColorClassifier,
) -> list[str]:
    """Why an image with these `confident_objects` misses its prompt, by clause; empty if right.

    All `include` clauses must hold, and no `exclude` clause may. A clause looks at its `count` most
    confident objects only: at their colours, and at their positions relative to every object of the
    clause that it points to, which must hold itself.
    """
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # of each clause, None where it does not hold
    for clause in record.get("include", []):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        if len(found) < count:
            problem = f"expected {name}>={count}, found {len(found)}"
        else:
            problem = ""
            if "color" in clause:
                problem = _color_problem(clause, classifier.classify(image, found, name))
            if "position" in clause and not problem:
                problem = _position_problem(clause, found, groups[clause["position"][1]])
        groups.append(None if problem else found)
        reasons += [problem] if problem else []
    for clause in record.get("exclude", []):
        name, found = clause["class"], objects.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reasons.append(f"expected {name}<{clause['count']}, found {len(found)}")
    return reasons


def _color_problem(clause: dict[str, Any], colors: list[str]) -> str:
    wanted, count = clause["color"], clause["count"]
    right = colors.count(wanted)
    if right >= count:
        return ""
    found = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return f"expected {wanted} {clause['class']}>={count}, found {right} {wanted}; and {found}"


def _position_problem(
    clause: dict[str, Any], found: list[Detection], targets: list[Detection] | None
) -> str:
    name, wanted = clause["class"], clause["position"][0]
    if targets is None:
        return f"no target for {name} to be {wanted}"
    for a in found:
        for b in targets:
            relations = relative_position(a.box, b.box)
            if wanted not in relations:
                seen = " and ".join(sorted(relations))
                return f"expected {name} {wanted} target, found {seen} target"
    return ""


def evaluate_image(
    image: Image.Image,
    record: Record,
    detector: Detector,
    classifier: ColorClassifier,
    filename: str = "",
) -> dict[str, Any]:
    """One row of GenEval's results file: filename, tag, prompt, correct, reason, metadata, details.

    `metadata` and `details` are JSON strings; `details` holds [x0, y0, x1, y1, score] of every
    object that counted, by class.
    """
    counting = record["tag"] == "counting"
    threshold = detector.counting_threshold if counting else detector.threshold
    objects = confident_objects(detector.detect(image), threshold)
    reasons = judge(image, objects, record, classifier)
    details = {}
    for name, found in objects.items():
        details[name] = [[*map(float, d.box), float(d.score)] for d in found]
    return {
        "filename": filename,
        "tag": record["tag"],
        "prompt": record["prompt"],
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "metadata": json.dumps(record),
        "details": json.dumps(details),
    }


# ---- all images


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of correct images per task, and the unweighted mean of tasks as `overall`.

    Returns overall, one score per tag in order of appearance, `correct_images`, `correct_prompts`
    (with any correct image), num_images, num_prompts; `intervals`, 95 % bounds per tag and of
    `overall`. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("got no results, expected at least one image")
    # tag -> prompt's metadata -> one verdict per image
    tasks: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        tasks.setdefault(row["tag"], {}).setdefault(row["metadata"], []).append(row["correct"])
    scores: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    correct_prompts: list[bool] = []
    for tag, prompts in tasks.items():
        verdicts = list(prompts.values())
        scores[tag] = float(np.mean(np.concatenate(verdicts)))
        intervals[tag] = wilson_interval(scores[tag] * len(verdicts), len(verdicts))
        correct_prompts += map(any, verdicts)
    shares = [(scores[tag], *intervals[tag]) for tag in tasks]
    return {
        "overall": float(np.mean(list(scores.values()))),
        **scores,
        "correct_images": float(np.mean([row["correct"] for row in rows])),
        "correct_prompts": float(np.mean(correct_prompts)),
        "num_images": len(rows),
        "num_prompts": len(correct_prompts),
        "intervals": {"overall": mean_interval(shares), **intervals},
        "interval_method": INTERVAL_METHOD,
    }


def wilson_interval(correct: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share from `correct` of `total` independent trials (Wilson 1927); 95 %."""
    share, spread = correct / total, z * z / total
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * float(np.sqrt(share * (1 - share) / total + spread / (4 * total)))
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(shares: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Bounds of the mean of independent shares (value, low, high), by MOVER (Zou and Donner 2008).

    Unlike a bootstrap it does not promise certainty where every task is all right or all wrong.
    """
    values, lows, highs = np.array(shares).T
    below, above = (np.linalg.norm(bounds - values) / len(values) for bounds in (lows, highs))
    return float(values.mean() - below), float(values.mean() + above)
