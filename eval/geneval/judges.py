"""A detector with its colour classifier, and the tests that both must pass before they score."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image

from vqrae.common.images import open_image
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.geneval.clip_colors import ClipColorClassifier
from vqrae.eval.geneval.mask2former import HUGGING_FACE, Mask2FormerDetector
from vqrae.eval.geneval.prompts import OBJECT_NAMES
from vqrae.eval.geneval.rules import ColorClassifier, Detector, Record, evaluate_image
from vqrae.eval.geneval.scene_detector import SceneColorClassifier, SceneDetector

PERSON: Record = {
    "tag": "single_object",
    "include": [{"class": "person", "count": 1}],
    "prompt": "a photograph of a person",
}


@dataclass(frozen=True)
class Judges:
    """A detector and the colour classifier that goes with it.

    Attributes:
        benchmark: what their scores are called: `GenEval` for the official detector alone.
        classes: what the detector knows.
        identity: which weights they have.
    """

    benchmark: str
    detector: Detector
    classifier: ColorClassifier
    classes: frozenset[str]
    identity: dict[str, str]


def scene_judges(sprites: str) -> Judges:
    """The rule-based detector of embedded scenes."""
    loaded = load_sprites(sprites)
    detector, classes = SceneDetector(loaded), frozenset(loaded.names)
    return Judges(
        "GenEval-scenes", detector, SceneColorClassifier(), classes, {"detector": "rules"}
    )


def coco_judges(name: str, weights: str | None, clip: str, device: str) -> Judges:
    """A Mask2Former on COCO with CLIP for colours, loaded and tested.

    `mmdet` is GenEval's own checkpoint, `transformers` one of Hugging Face; `clip` a folder or hub
    id. Raises NotMeasured when weights are missing, RuntimeError when the detector is blind.
    """
    if name == "mmdet":
        detector, benchmark = Mask2FormerDetector.from_mmdet(weights, device), "GenEval"
    else:
        detector = Mask2FormerDetector.from_transformers(weights or HUGGING_FACE, device)
        benchmark = "GenEval-HF"
    classifier = ClipColorClassifier.from_pretrained(clip, device)
    # A portrait of Grace Hopper, which is always installed.
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    require_sight(detector, classifier, open_image(photograph), PERSON)
    identity = {"detector": detector.identity, "colors": classifier.identity}
    return Judges(benchmark, detector, classifier, frozenset(OBJECT_NAMES), identity)


def require_sight(
    detector: Detector, classifier: ColorClassifier, image: Image.Image, record: Record
) -> None:
    """Refuse, with RuntimeError, a detector that fails on an image that satisfies `record`.

    A broken installation would otherwise score everything near zero, without an error.
    """
    row = evaluate_image(image, record, detector, classifier)
    if not row["correct"]:
        raise RuntimeError(
            f"detector {detector.name} fails on a known image of {record['prompt']!r}: "
            f"{row['reason']}. It found {row['details']}. Its scores would be meaningless: check "
            "its weights, configuration and compiled kernels"
        )


def require_known_classes(judges: Judges, records: list[Record]) -> None:
    """Refuse, with ValueError, prompts about classes that the detector does not know."""
    asked: set[str] = set()
    for record in records:
        asked |= {clause["class"] for clause in record["include"]}
    if unknown := sorted(asked - judges.classes):
        raise ValueError(
            f"prompts ask for {', '.join(unknown[:5])} ({len(unknown)} classes), which detector "
            f"{judges.detector.name} does not know: give the suite= that these prompts belong to"
        )
