"""What sees for GenEval, by name, with images on which it must prove that it does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from vqrae.common.images import open_image
from vqrae.data.scenes.scene import COLORS as COLOR_VALUES
from vqrae.eval.geneval.prompts import OBJECT_NAMES
from vqrae.eval.geneval.rules import ColorClassifier, Detection, Detector, KnownImage, require_sight

DetectorName = Literal["mmdet", "transformers", "scenes"]
CLEAR_COLORS = (
    "red",
    "yellow",
    "green",
    "blue",
    "black",
    "white",
)  # nobody mistakes a ball of these for another


@dataclass(frozen=True)
class Judges:
    """A detector and a colour classifier that belong together.

    Attributes:
        benchmark: what scores by them are called: `GenEval` for the official detector alone.
        names: classes that the detector knows.
        known: what `require_sight` asks it.
        identity: which weights they are made of.
        mistaken: plain colours that the classifier calls by another name, with that name.
    """

    benchmark: str
    detector: Detector
    classifier: ColorClassifier
    names: frozenset[str]
    known: list[KnownImage]
    identity: dict[str, str]
    mistaken: dict[str, str]


def build_judges(
    name: DetectorName,
    *,
    weights: str | None = None,
    clip: str,
    sprites: str = "shapes",
    known_image: str | None = None,
    device: str = "cpu",
) -> Judges:
    """Load and test a detector with its colour classifier.

    Args:
        name: `mmdet`, GenEval's own checkpoint; `transformers`, one of Hugging Face; `scenes`, the rule-based one.
        weights: checkpoint of the first two, see `Mask2FormerDetector`.
        clip: CLIP folder or hub id for colours.
        sprites: what scenes are made of.
        known_image: a photograph with a person in it; matplotlib's sample when not given.

    Raises:
        NotMeasured: when weights are missing, with where to get them.
        RuntimeError: when the detector is blind.
    """
    if name == "scenes":
        judges = _scene_judges(sprites)
    else:
        judges = _coco_judges(name, weights, clip, known_image, device)
    require_sight(judges.detector, judges.classifier, judges.known)
    return judges


def _scene_judges(sprites: str) -> Judges:
    from vqrae.eval.geneval.scenes import SceneBenchmark

    benchmark = SceneBenchmark(sprites)
    names = frozenset(benchmark.sprites.names)
    identity = {"detector": "rules"}
    return Judges(
        "GenEval-scenes",
        benchmark.detector,
        benchmark.classifier,
        names,
        benchmark.known,
        identity,
        {},
    )


def _coco_judges(
    name: DetectorName, weights: str | None, clip: str, known_image: str | None, device: str
) -> Judges:
    from vqrae.eval.geneval.clip_colors import ClipColorClassifier
    from vqrae.eval.geneval.mask2former import HUGGING_FACE, Mask2FormerDetector

    if name == "mmdet":
        detector, benchmark = Mask2FormerDetector.from_mmdet(weights, device), "GenEval"
    else:
        detector, benchmark = (
            Mask2FormerDetector.from_transformers(weights or HUGGING_FACE, device),
            "GenEval-HF",
        )
    classifier = ClipColorClassifier.from_pretrained(clip, device)
    record: dict[str, Any] = {
        "tag": "single_object",
        "include": [{"class": "person", "count": 1}],
        "prompt": "a photograph of a person",
    }
    known = [(open_image(known_image or sample_photograph()), record)]
    identity = {"detector": detector.identity, "colors": classifier.identity}
    mistaken = mistaken_colors(classifier)
    return Judges(
        benchmark, detector, classifier, frozenset(OBJECT_NAMES), known, identity, mistaken
    )


def sample_photograph() -> Path:
    """A photograph of one person that an installed package carries: matplotlib's portrait of Grace Hopper.

    Raises:
        FileNotFoundError: when the installation left the sample data out.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, the self-test needs a photograph of a person: give known_image=FILE"
        )
    return path


def mistaken_colors(classifier: ColorClassifier) -> dict[str, str]:
    """What a classifier calls plain balls whose colour it does not name."""
    found = {}
    for color in CLEAR_COLORS:
        image, mask = Image.new("RGB", (224, 224), (120, 130, 140)), Image.new("1", (224, 224))
        paint = tuple(round(255 * value) for value in COLOR_VALUES[color])
        ImageDraw.Draw(image).ellipse((32, 32, 192, 192), fill=paint)
        ImageDraw.Draw(mask).ellipse((32, 32, 192, 192), fill=1)
        ball = Detection("sports ball", 1.0, (32, 32, 193, 193), np.asarray(mask))
        [found[color]] = classifier.classify(image, [ball], ball.name)
    return {color: answer for color, answer in found.items() if answer != color}


def require_known_classes(judges: Judges, records: list[dict[str, Any]]) -> None:
    """Refuse prompts about classes that the detector has never heard of: they could only score zero.

    Raises:
        ValueError: naming some of them.
    """
    asked = {clause["class"] for record in records for clause in record["include"]}
    unknown = sorted(asked - judges.names)
    if unknown:
        raise ValueError(
            f"prompts ask for {', '.join(unknown[:5])} ({len(unknown)} classes) that detector {judges.detector.name} does "
            "not know: give the detector= that belongs to these prompts"
        )
