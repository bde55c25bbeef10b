"""GenEval's prompts by its published rules: seed 43 gives the 553 official ones, byte for byte.

Scores on the official suite compare with other papers'. Any other seed gives a fresh suite of the
same families, which cannot have leaked into training captions."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from vqrae.data.scenes.language import NUMBER_WORDS, clause, plural, record, with_article
from vqrae.data.scenes.scene import RELATIONS
from vqrae.eval.geneval.rules import COLORS, Record

OFFICIAL_SEED = 43
OFFICIAL_MD5 = "9a0ed515640279a48ed3380d90aec0ed"  # of the official evaluation_metadata.jsonl
SAMPLES = 100  # of each task but single_object, before repetitions are dropped

# COCO's 80 things in COCO's order; "mouse", "remote" and "keyboard" have a word more so that a
# prompt is understood.
OBJECT_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def official_prompts(seed: int = OFFICIAL_SEED) -> list[Record]:
    """A suite of GenEval prompts over COCO's objects, as metadata records in the official order.

    Seed 43 is the official suite; any other a fresh one (0 has 548 prompts, 42 has 559).
    """
    # The order of the samples is part of the rules: all of them come from one random generator.
    rng = np.random.default_rng(seed)
    count = len(OBJECT_NAMES)
    records = [_single_object(int(index)) for index in rng.choice(count, size=count, replace=False)]
    for sample in (_two_object, _counting, _colors, _position, _color_attr):
        records += [sample(rng) for _ in range(SAMPLES)]
    return list({json.dumps(each): each for each in records}.values())


def metadata_lines(records: Sequence[Record]) -> str:
    """The content of `evaluation_metadata.jsonl`."""
    return "".join(json.dumps(each) + "\n" for each in records)


def suite_name(records: Sequence[Record]) -> str:
    """`official` for the 553 official records, else `md5:` and the start of the checksum."""
    digest = hashlib.md5(metadata_lines(records).encode(), usedforsecurity=False).hexdigest()
    return "official" if digest == OFFICIAL_MD5 else f"md5:{digest[:8]}"


# ---- one prompt of each task


def _pair(rng: np.random.Generator) -> tuple[str, str]:
    a, b = rng.choice(len(OBJECT_NAMES), size=2, replace=False)
    return OBJECT_NAMES[a], OBJECT_NAMES[b]


def _single_object(index: int) -> Record:
    name = OBJECT_NAMES[index]
    return record("single_object", [clause(name)], with_article(name))


def _two_object(rng: np.random.Generator) -> Record:
    a, b = _pair(rng)
    phrase = f"{with_article(a)} and {with_article(b)}"
    return record("two_object", [clause(a), clause(b)], phrase)


def _counting(rng: np.random.Generator) -> Record:
    name = OBJECT_NAMES[rng.choice(len(OBJECT_NAMES))]
    count = int(rng.integers(2, 4, endpoint=True))
    phrase, exclude = f"{NUMBER_WORDS[count]} {plural(name)}", [clause(name, count + 1)]
    return record("counting", [clause(name, count)], phrase, exclude=exclude)


def _colors(rng: np.random.Generator) -> Record:
    name = OBJECT_NAMES[rng.choice(len(OBJECT_NAMES) - 1) + 1]  # no coloured person
    color = COLORS[rng.choice(len(COLORS))]
    return record("colors", [clause(name, color=color)], with_article(f"{color} {name}"))


def _position(rng: np.random.Generator) -> Record:
    a, b = _pair(rng)
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [clause(b), clause(a, position=[relation, 0])]
    return record("position", include, f"{with_article(a)} {relation} {with_article(b)}")


def _color_attr(rng: np.random.Generator) -> Record:
    names = rng.choice(len(OBJECT_NAMES) - 1, size=2, replace=False) + 1
    colors = rng.choice(len(COLORS), size=2, replace=False)
    pairs = [(OBJECT_NAMES[name], COLORS[color]) for name, color in zip(names, colors, strict=True)]
    phrase = " and ".join(with_article(f"{color} {name}") for name, color in pairs)
    return record("color_attr", [clause(name, color=color) for name, color in pairs], phrase)
