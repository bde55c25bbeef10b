"""GenEval's scoring rules (Ghosh et al., arXiv 2310.11513; MIT), over any detector and colour classifier.

The rules are those of the official `evaluate_images.py` and `summary_scores.py`, edge cases included: the same detections
give the same verdicts, reasons and numbers. What sees is an argument, so that COCO detectors and the rule-based one of the
embedded scenes share this file; every score should be quoted with the detector's name.
"""

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

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels."""
KnownImage = tuple[Image.Image, dict[str, Any]]
"""An image and a record that it satisfies without doubt."""


@dataclass(frozen=True)
class Detection:
    """One object that a detector found; `mask`, where there is one, is for the colour classifier that goes with it."""

    name: str
    score: float
    box: Box
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects. Detections count above `threshold`, in the counting task above `counting_threshold`."""

    name: str
    threshold: float
    counting_threshold: float

    def detect(self, image: Image.Image) -> list[Detection]:
        """All objects in an RGB image, in any order, also the doubtful ones."""


class ColorClassifier(Protocol):
    """Names the colour of detected objects, one of GenEval's ten."""

    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        """One colour per detection; all of them are of `class_name`."""


# ---- one image


@dataclass(frozen=True)
class Verdict:
    """Whether an image holds what its prompt asks for, and if not, why (one line per violated clause)."""

    correct: bool
    reason: str


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
    """Where box `a` lies seen from `b`: up to two of left of, right of, above, below; empty when too close to say."""
    edges_a, edges_b = (
        np.array(a, dtype=float).reshape(2, 2),
        np.array(b, dtype=float).reshape(2, 2),
    )
    offset = edges_a.mean(axis=0) - edges_b.mean(axis=0)
    extents = np.abs(edges_a[1] - edges_a[0]) + np.abs(edges_b[1] - edges_b[0])
    revised = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_MARGIN * extents, 0)
    if np.all(np.abs(revised) < 1e-3):
        return set()
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
    metadata: dict[str, Any],
    classifier: ColorClassifier,
) -> Verdict:
    """Judge an image by the objects in it (`confident_objects`).

    All `include` clauses must hold, and no `exclude` clause may. A clause looks at its `count` most confident objects
    only: their colours and their positions against every object of the clause it points to, which must hold itself.
    """
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        problems = []
        if len(found) < count:
            problems.append(f"expected {name}>={count}, found {len(found)}")
        else:
            if "color" in clause:
                problems += _color_problems(clause, classifier.classify(image, found, name))
            if "position" in clause and not problems:
                problems += _position_problems(clause, found, groups)
        groups.append(None if problems else found)
        reasons += problems
    for clause in metadata.get("exclude", []):
        found = objects.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {len(found)}")
    return Verdict(not reasons, "\n".join(reasons))


def _color_problems(clause: dict[str, Any], colors: list[str]) -> list[str]:
    wanted, count = clause["color"], clause["count"]
    if colors.count(wanted) >= count:
        return []
    found = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return [
        f"expected {wanted} {clause['class']}>={count}, found {colors.count(wanted)} {wanted}; and {found}"
    ]


def _position_problems(
    clause: dict[str, Any], found: list[Detection], groups: list[list[Detection] | None]
) -> list[str]:
    wanted, target = clause["position"]
    targets = groups[target]
    if targets is None:
        return [f"no target for {clause['class']} to be {wanted}"]
    for a in found:
        for b in targets:
            relations = relative_position(a.box, b.box)
            if wanted not in relations:
                return [
                    f"expected {clause['class']} {wanted} target, found {' and '.join(sorted(relations))} target"
                ]
    return []


def evaluate_image(
    image: Image.Image,
    metadata: dict[str, Any],
    detector: Detector,
    classifier: ColorClassifier,
    filename: str = "",
) -> dict[str, Any]:
    """One row of GenEval's results: filename, tag, prompt, correct, reason, metadata and details (both JSON strings).

    `details` holds [x0, y0, x1, y1, score] of every object that counted, by class.
    """
    threshold = detector.counting_threshold if metadata["tag"] == "counting" else detector.threshold
    objects = confident_objects(detector.detect(image), threshold)
    verdict = judge(image, objects, metadata, classifier)
    details = {
        name: [[*map(float, d.box), float(d.score)] for d in found]
        for name, found in objects.items()
    }
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }


def require_sight(
    detector: Detector, classifier: ColorClassifier, known: Iterable[KnownImage]
) -> None:
    """Refuse a detector that fails on known images: a broken installation would otherwise score everything near zero.

    Raises:
        RuntimeError: naming the detector and what it missed.
    """
    for image, metadata in known:
        row = evaluate_image(image, metadata, detector, classifier)
        if not row["correct"]:
            raise RuntimeError(
                f"detector {detector.name} fails on a known image of {metadata['prompt']!r}: {row['reason']}. It saw "
                f"{row['details']}. Scores from it would mean nothing: check its weights, configuration and compiled kernels."
            )
