"""What is said about scenes: captions in GenEval's families, questions with answers, benchmark prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np

from vqrae.data.scenes.scene import (
    COLOR_NAMES,
    RELATIONS,
    Scene,
    SceneObject,
    dominant_relation,
    is_held_out_pair,
    is_held_out_triple,
)

FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
DESCRIBE = "what is in the picture ?"
# Fifths of the image, from left to right and from top to bottom.
COLUMNS = (
    "on the far left",
    "on the left",
    "between left and right",
    "on the right",
    "on the far right",
)
ROWS = (
    "at the far top",
    "at the top",
    "between top and bottom",
    "at the bottom",
    "at the far bottom",
)


def with_article(phrase: str) -> str:
    """`a circle`, `an orange circle` (GenEval's rule: "an" before a, e, i, o, u)."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """GenEval's plural: "es" after a final s, else "s"."""
    return name + ("es" if name.endswith("s") else "s")


def relation(a: SceneObject, b: SceneObject) -> str | None:
    """Where `a` lies seen from `b`, or None when the offset is too diagonal to name."""
    dx, dy = abs(a.center[0] - b.center[0]), abs(a.center[1] - b.center[1])
    if max(dx, dy) < 1.5 * min(dx, dy):
        return None
    return dominant_relation(a, b)


def caption(
    scene: Scene, names: Sequence[str], rng: np.random.Generator, *, detailed: bool = False
) -> str:
    """A true caption that mentions every object, in one of GenEval's forms where one fits.

    Args:
        detailed: always name the relation of a pair, and the colours.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    plain, rich = zip(*(object_phrases(o, names) for o in objects), strict=True)
    one_name = len({o.name for o in objects}) == 1
    one_color = len({o.color for o in objects}) == 1
    forms = [_enumerate(plain), _enumerate(rich)]
    if len(objects) > 1 and one_name:
        number, name = NUMBER_WORDS[len(objects)], plural(names[objects[0].name])
        exact = (
            f"{number} {COLOR_NAMES[objects[0].color]} {name}" if one_color else _enumerate(rich)
        )
        forms = [f"{number} {name}", f"{number} {name}", exact]
    elif len(objects) == 2 and (where := relation(*objects)):
        forms = [*forms * 2, f"{plain[0]} {where} {plain[1]}", f"{rich[0]} {where} {rich[1]}"]
    if detailed:
        forms = forms[-1:]
    return f"a photo of {forms[rng.integers(len(forms))]}"


def description(
    scene: Scene, names: Sequence[str], rng: np.random.Generator, image_size: int
) -> str:
    """What is there and where, each object once: `a photo of a red star on the far left at the top and …`."""
    phrases = []
    for i in rng.permutation(len(scene.objects)):
        column, row = place(scene.objects[i], image_size)
        phrases.append(
            f"{object_phrases(scene.objects[i], names)[1]} {COLUMNS[column]} {ROWS[row]}"
        )
    return f"a photo of {_enumerate(phrases)}"


def wording(scene: Scene, names: Sequence[str], rng: np.random.Generator, image_size: int) -> str:
    """What a generator is trained on: a short caption, or for one or two objects as often a description.

    Descriptions of more would make the text as long as the image.
    """
    if len(scene.objects) <= 2 and rng.random() < 0.5:
        return description(scene, names, rng, image_size)
    return caption(scene, names, rng)


def object_phrases(item: SceneObject, names: Sequence[str]) -> tuple[str, str]:
    """What one object is called: `a star`, `a red star`."""
    return with_article(names[item.name]), with_article(
        f"{COLOR_NAMES[item.color]} {names[item.name]}"
    )


def place(item: SceneObject, image_size: int) -> tuple[int, int]:
    """Column and row, indices of `COLUMNS` and `ROWS`, that hold the centre of one object."""
    x, y = item.center
    return int(len(COLUMNS) * x / image_size), int(len(ROWS) * y / image_size)


def place_phrases(item: SceneObject, image_size: int) -> tuple[str, str]:
    """Where the centre of one object lies: `a thing on the far left`, `a thing at the top`."""
    column, row = place(item, image_size)
    return f"a thing {COLUMNS[column]}", f"a thing {ROWS[row]}"


def _enumerate(phrases: Sequence[str]) -> str:
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}" if len(phrases) > 1 else phrases[0]


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one-word answer; `kind` is shape, color, count, relation or yes_no."""

    kind: str
    text: str
    answer: str


# Probability of asking how many things there are, by their number: makes the four answers equally frequent.
_ASK_COUNT = {1: 0.67, 2: 0.4, 3: 1.0, 4: 1.0}


def questions(
    scene: Scene, names: Sequence[str], rng: np.random.Generator, limit: int | None = None
) -> list[Question]:
    """Questions that the scene answers without doubt, in random order, at most `limit`.

    Answers of every kind are balanced (eight names, ten colours, four numbers, four relations, yes as often as no), so
    that guessing without the image scores low.
    """
    asked = [
        *_attribute_questions(scene, names),
        *_count_questions(scene, rng),
        *_relation_questions(scene, names, rng),
        *_yes_no_questions(scene, names, rng),
    ]
    return [asked[i] for i in rng.permutation(len(asked))][:limit]


def _unique(scene: Scene, attribute: str) -> list[SceneObject]:
    values = [getattr(o, attribute) for o in scene.objects]
    return [o for o in scene.objects if values.count(getattr(o, attribute)) == 1]


def _attribute_questions(scene: Scene, names: Sequence[str]) -> list[Question]:
    shapes = [
        Question("shape", f"what is the {COLOR_NAMES[o.color]} thing ?", names[o.name])
        for o in _unique(scene, "color")
    ]
    colors = [
        Question("color", f"what color is the {names[o.name]} ?", COLOR_NAMES[o.color])
        for o in _unique(scene, "name")
    ]
    return shapes + colors


def _count_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    count = len(scene.objects)
    if rng.random() > _ASK_COUNT[count]:
        return []
    return [Question("count", "how many things are there ?", NUMBER_WORDS[count])]


def _relation_questions(
    scene: Scene, names: Sequence[str], rng: np.random.Generator
) -> list[Question]:
    pairs = [(a, b, relation(a, b)) for a, b in permutations(_unique(scene, "name"), 2)]
    pairs = [pair for pair in pairs if pair[2]]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:2]]
    return [
        Question(
            "relation",
            f"where is the {names[a.name]} seen from the {names[b.name]} ?",
            str(where).split()[0],
        )
        for a, b, where in chosen
    ]


def _yes_no_questions(
    scene: Scene, names: Sequence[str], rng: np.random.Generator
) -> list[Question]:
    """Is there such a thing? A wrong thing shares its name or its colour with a real one."""
    item = scene.objects[rng.integers(len(scene.objects))]
    name, color = item.name, item.color
    answer = "yes"
    if rng.random() < 0.5:
        answer, present = "no", {(o.name, o.color) for o in scene.objects}
        while (name, color) in present:
            if rng.random() < 0.5:
                name, color = int(rng.integers(len(names))), item.color
            else:
                name, color = item.name, int(rng.integers(len(COLOR_NAMES)))
    asked = with_article(f"{COLOR_NAMES[color]} {names[name]}")
    return [Question("yes_no", f"is there {asked} ?", answer)]


def benchmark_prompts(
    names: Sequence[str], per_family: int = 25, seed: int = 43
) -> list[dict[str, Any]]:
    """GenEval's six families of prompts over these names, as GenEval metadata records.

    Half of the prompts of the families that compose (colors, position, color_attr) hold a combination never seen in
    training. `single_object` has no more prompts than names; they repeat until the family is full.

    Returns:
        Records with keys tag, include, [exclude,] prompt, the format of GenEval's `evaluation_metadata.jsonl`.
    """
    rng = np.random.default_rng(seed)
    everything = range(len(names))
    pairs = list(permutations(everything, 2))
    things = list(product(everything, range(len(COLOR_NAMES))))
    triples = [(a, r, b) for a, b in pairs for r in RELATIONS]

    def half_held_out(items: list, held_out: list) -> list:
        rest = [item for item in items if item not in set(held_out)]
        new, old = (
            _draw(rng, held_out, per_family // 2),
            _draw(rng, rest, per_family - per_family // 2),
        )
        return [
            item
            for both in zip(old, [*new, None], strict=False)
            for item in both
            if item is not None
        ]

    records = [
        _record("single_object", [(names[n], 1)], with_article(names[n]))
        for n in _draw(rng, everything, per_family)
    ]
    for a, b in _draw(rng, pairs, per_family):
        text = f"{with_article(names[a])} and {with_article(names[b])}"
        records.append(_record("two_object", [(names[a], 1), (names[b], 1)], text))
    for n, count in _draw(rng, list(product(everything, (2, 3, 4))), per_family):
        record = _record(
            "counting", [(names[n], count)], f"{NUMBER_WORDS[count]} {plural(names[n])}"
        )
        record["exclude"] = [{"class": names[n], "count": count + 1}]
        records.append({key: record[key] for key in ("tag", "include", "exclude", "prompt")})
    for n, c in half_held_out(things, [t for t in things if is_held_out_pair(*t)]):
        record = _record("colors", [(names[n], 1)], with_article(f"{COLOR_NAMES[c]} {names[n]}"))
        record["include"][0]["color"] = COLOR_NAMES[c]
        records.append(record)
    for a, r, b in half_held_out(triples, [t for t in triples if is_held_out_triple(*t)]):
        text = f"{with_article(names[a])} {r} {with_article(names[b])}"
        record = _record("position", [(names[b], 1), (names[a], 1)], text)
        record["include"][1]["position"] = [r, 0]
        records.append(record)
    attributed = [(a, b) for a, b in product(things, things) if a[0] != b[0] and a[1] != b[1]]
    for a, b in half_held_out(
        attributed, [p for p in attributed if is_held_out_pair(*p[0]) or is_held_out_pair(*p[1])]
    ):
        phrases = [with_article(f"{COLOR_NAMES[c]} {names[n]}") for n, c in (a, b)]
        record = _record("color_attr", [(names[a[0]], 1), (names[b[0]], 1)], " and ".join(phrases))
        for clause, (_, color) in zip(record["include"], (a, b), strict=True):
            clause["color"] = COLOR_NAMES[color]
        records.append(record)
    return records


def _draw(rng: np.random.Generator, items: Sequence, count: int) -> list:
    """`count` items in random order, each once before any comes twice."""
    order = [i for _ in range(-(-count // len(items))) for i in rng.permutation(len(items))]
    return [items[i] for i in order[:count]]


def _record(tag: str, include: list[tuple[str, int]], phrase: str) -> dict[str, Any]:
    clauses = [{"class": name, "count": count} for name, count in include]
    return {"tag": tag, "include": clauses, "prompt": f"a photo of {phrase}"}


def vocabulary_texts(names: Sequence[str]) -> list[str]:
    """Sentences that hold every word that captions and questions over these names can use."""
    words = [*names, *(plural(name) for name in names), *COLOR_NAMES, *NUMBER_WORDS, *RELATIONS]
    frames = [
        "a photo of an and , what color is the thing ? how many things are there ?",
        "where is seen from yes no",
    ]
    return [*frames, DESCRIBE, *COLUMNS, *ROWS, " ".join(words)]
