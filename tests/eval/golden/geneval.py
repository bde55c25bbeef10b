"""Random detections for GenEval's prompts, and what its own evaluate_images.py says of them.

git clone https://github.com/djghosh13/geneval
python tests/eval/golden/geneval.py geneval > geneval.json      # writes 300 cases
python tests/eval/golden/geneval.py geneval 12000               # counts the cases that differ
"""

import json
import re
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqrae.eval.geneval.prompts import OBJECT_NAMES, official_prompts
from vqrae.eval.geneval.rules import COLORS, Detection, evaluate_image

IMAGE = Image.new("RGB", (64, 64))
Boxes = list[np.ndarray]
"""For each of COCO's 80 classes (n, 5) float32: x0, y0, x1, y1, score."""


def color_of(box: Sequence[float]) -> str:
    """A colour that depends on the box alone."""
    return COLORS[zlib.crc32(np.asarray(box[:4], np.float32).tobytes()) % len(COLORS)]


def cases(count: int, seed: int = 0) -> Iterator[tuple[dict[str, Any], Boxes]]:
    """Records with boxes on whole pixels, anywhere, or small; scores around the thresholds."""
    rng, records = np.random.default_rng(seed), official_prompts()
    for number in range(count):
        record, side = records[rng.integers(len(records))], (512, 512, 12)[number % 3]
        asked = [clause["class"] for clause in record["include"]]
        boxes: Boxes = [np.zeros((0, 5), np.float32) for _ in OBJECT_NAMES]
        for name in dict.fromkeys([*asked, *rng.choice(OBJECT_NAMES, 3, replace=False)]):
            many = [0, 1, 1, 2, 2, 3, 4, 5, 20]
            found = int(rng.choice(many) if name in asked else rng.integers(0, 3))
            corners = rng.integers(0, side, (found, 2))
            extents = rng.integers(1, side // 2, (found, 2))
            edges = np.concatenate([corners, corners + extents], 1)
            edges = edges + (rng.random((found, 4)) if number % 3 == 1 else 0)
            low = rng.choice([0, 0.28, 0.85])
            scores = low + rng.random((found, 1)) * {0: 1, 0.28: 0.04, 0.85: 0.15}[float(low)]
            boxes[OBJECT_NAMES.index(name)] = np.concatenate([edges, scores], 1).astype(np.float32)
        if rng.random() < 0.5:  # one object of the right colour, so that a few prompts are right
            for clause in record["include"]:
                place = OBJECT_NAMES.index(clause["class"])
                right = [box for box in boxes[place] if color_of(box) == clause.get("color")]
                if right:
                    boxes[place] = np.array([[*right[0][:4], 0.95]], np.float32)
        yield record, boxes


class Ours:
    """A detector that sees given boxes, and a classifier that names their colours."""

    name, threshold, counting_threshold = "given", 0.3, 0.9

    def __init__(self, boxes: Boxes) -> None:
        self.found = []
        for name, found in zip(OBJECT_NAMES, boxes, strict=True):
            for x0, y0, x1, y1, score in np.asarray(found, float).tolist():
                self.found.append(Detection(name, score, (x0, y0, x1, y1)))

    def detect(self, image: Image.Image) -> list[Detection]:
        return self.found

    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        return [color_of(detection.box) for detection in detections]


def ours(record: dict[str, Any], boxes: Boxes) -> dict[str, Any]:
    """Our row."""
    judge = Ours(boxes)
    return evaluate_image(IMAGE, record, judge, judge)


def official(checkout: Path) -> Callable[[dict[str, Any], Boxes], dict[str, Any]]:
    """The official `evaluate_image`, with given boxes and `color_of` for detector and CLIP."""
    for name in ("mmdet", "mmdet.apis", "open_clip", "clip_benchmark", "clip_benchmark.metrics"):
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(inference_detector=None, init_detector=None)
        vars(module)["zeroshot_classification"] = types.SimpleNamespace()
    source = (checkout / "evaluation" / "evaluate_images.py").read_text()
    code: dict[str, Any] = {"__name__": "official"}
    exec(source.replace('assert DEVICE == "cuda"', ""), code)
    given: dict[str, Boxes] = {}
    code.update(THRESHOLD=0.3, COUNTING_THRESHOLD=0.9, MAX_OBJECTS=16, NMS_THRESHOLD=1.0)
    code.update(POSITION_THRESHOLD=0.1, classnames=OBJECT_NAMES, object_detector=None)
    code["inference_detector"] = lambda detector, path: given["boxes"]
    code["Image"] = types.SimpleNamespace(open=lambda path: IMAGE)
    code["color_classification"] = lambda image, found, name: [color_of(box) for box, _ in found]

    def evaluate(record: dict[str, Any], boxes: Boxes) -> dict[str, Any]:
        given["boxes"] = boxes
        return code["evaluate_image"]("", record)

    return evaluate


def outcome(row: dict[str, Any]) -> list[Any]:
    """What must be equal of a row: verdict, reason with sorted directions, objects that counted."""
    both = lambda m: f"found {' and '.join(sorted(m[1].split(' and ')))} target"  # noqa: E731
    reason = re.sub(r"found (.*) target", both, row["reason"])
    details = json.dumps(json.loads(row["details"]), sort_keys=True)
    return [int(row["correct"]), reason, zlib.crc32(details.encode())]


def main() -> None:
    evaluate = official(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        both = cases(int(sys.argv[2]), seed=1)
        found = [(outcome(evaluate(*case)), outcome(ours(*case))) for case in both]
        different, right = sum(a != b for a, b in found), sum(a[0] for a, _ in found)
        print(f"{different} of {len(found)} cases differ, {right} images are right")
    else:
        lines = ",\n".join(json.dumps(outcome(evaluate(*case))) for case in cases(300))
        print(f"[\n{lines}\n]")


if __name__ == "__main__":
    main()
