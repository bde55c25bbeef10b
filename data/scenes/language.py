"""Text about scenes: captions in GenEval's families, questions with answers, benchmark prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


# ---- words


def with_article(phrase: str) -> str:
    """`a circle`, `an orange circle` (GenEval's rule: "an" before a, e, i, o, u)."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """GenEval's plural: "es" after a final s, else "s"."""
    return name + ("es" if name.endswith("s") else "s")


def _enumerate(phrases: Sequence[str]) -> str:
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}" if len(phrases) > 1 else phrases[0]


def object_phrases(item: SceneObject, names: Sequence[str]) -> tuple[str, str]:
    """What one object is called: `a star`, `a red star`."""
    name = names[item.name]
    return with_article(name), with_article(f"{COLOR_NAMES[item.color]} {name}")


def place(item: SceneObject, image_size: int) -> tuple[int, int]:
    """Column and row, indices of `COLUMNS` and `ROWS`, that hold the centre of one object."""
    x, y = item.center
    return int(len(COLUMNS) * x / image_size), int(len(ROWS) * y / image_size)


def place_phrases(item: SceneObject, image_size: int) -> tuple[str, str]:
    """Where the centre of one object is: `a thing on the far left`, `a thing at the top`."""
    column, row = place(item, image_size)
    return f"a thing {COLUMNS[column]}", f"a thing {ROWS[row]}"


def relation(a: SceneObject, b: SceneObject) -> str | None:
    """Where `a` is seen from `b`, or None when the offset is too diagonal to name."""
    dx, dy = abs(a.center[0] - b.center[0]), abs(a.center[1] - b.center[1])
    if max(dx, dy) < 1.5 * min(dx, dy):
        return None
    return dominant_relation(a, b)


def vocabulary_texts(names: Sequence[str]) -> list[str]:
    """Sentences that hold every word that captions and questions over these names can use."""
    words = [*names, *map(plural, names), *COLOR_NAMES, *NUMBER_WORDS, *RELATIONS]
    frames = [
        "a photo of an and , what color is the thing ? how many things are there ?",
        "where is seen from yes no",
    ]
    return [*frames, DESCRIBE, *COLUMNS, *ROWS, " ".join(words)]


# ---- captions


def shuffled(objects: Sequence[SceneObject], rng: np.random.Generator) -> list[SceneObject]:
    """The objects in random order."""
    return [objects[i] for i in rng.permutation(len(objects))]


def reading_order(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """The objects from top to bottom, then from left to right."""
    return sorted(objects, key=lambda item: (item.top, item.left))


def caption(
    objects: Sequence[SceneObject],
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    detailed: bool = False,
) -> str:
    """A true caption that mentions every object, in one of GenEval's forms where one fits.

    Lists keep the order of the objects.

    A `detailed` one always names the relation of a pair, and the colours.
    """
    plain, rich = zip(*(object_phrases(o, names) for o in objects), strict=True)
    forms = [_enumerate(plain), _enumerate(rich)]
    if len(objects) > 1 and len({o.name for o in objects}) == 1:
        number, name = NUMBER_WORDS[len(objects)], plural(names[objects[0].name])
        one_color = len({o.color for o in objects}) == 1
        colored = f"{number} {COLOR_NAMES[objects[0].color]} {name}"
        counted = f"{number} {name}"
        forms = [counted, counted, colored if one_color else _enumerate(rich)]
    elif len(objects) == 2 and relation(*objects):
        # Twice: a relation is said in every third caption of a pair, and from either object.
        a, b = rng.permutation(2)
        where = relation(objects[a], objects[b])
        forms = [*forms * 2, f"{plain[a]} {where} {plain[b]}", f"{rich[a]} {where} {rich[b]}"]
    if detailed:
        forms = forms[-1:]
    return f"a photo of {forms[rng.integers(len(forms))]}"


def description(objects: Sequence[SceneObject], names: Sequence[str], image_size: int) -> str:
    """Each object once, with its place: `a photo of a red star on the left at the top and …`."""
    phrases = []
    for item in objects:
        column, row = place(item, image_size)
        colored = object_phrases(item, names)[1]
        phrases.append(f"{colored} {COLUMNS[column]} {ROWS[row]}")
    return f"a photo of {_enumerate(phrases)}"


def wording(scene: Scene, names: Sequence[str], rng: np.random.Generator, image_size: int) -> str:
    """Text for a generator: a short caption, or as often a description of one or two objects.

    Descriptions of more would make the text as long as the image. The first object that it names is
    the first that the codes of an image reach: a generator need not find out which one is left.
    """
    objects = reading_order(scene.objects)
    if len(objects) <= 2 and rng.random() < 0.5:
        return description(objects, names, image_size)
    return caption(objects, names, rng)


# ---- questions


@dataclass(frozen=True)
class Question:
    """A question and its answer, one word for all kinds but the last: shape, color, count,
    relation, yes_no, place.
    """

    kind: str
    text: str
    answer: str


# Probability of asking for the number of things, by that number: the four answers become equally
# frequent.
_ASK_COUNT = {1: 0.67, 2: 0.4, 3: 1.0, 4: 1.0}


def questions(
    scene: Scene, names: Sequence[str], rng: np.random.Generator, limit: int | None = None
) -> list[Question]:
    """Questions that the scene answers without doubt, in random order, at most `limit`.

    Answers of every kind are balanced (eight names, ten colours, four numbers, four relations, yes
    as often as no), so that guessing without the image scores low.
    """
    asked = [
        *_attribute_questions(scene, names),
        *_count_questions(scene, rng),
        *_relation_questions(scene, names, rng),
        _yes_no_question(scene, names, rng),
    ]
    return [asked[i] for i in rng.permutation(len(asked))][:limit]


def lesson(
    scene: Scene, names: Sequence[str], rng: np.random.Generator, image_size: int
) -> list[Question]:
    """What a model is taught of a scene: `questions` and more of them, in random order.

    Relations are the hardest, and only pairs of things have one: all pairs are compared. Every
    second thing is asked for its place, which a comparison needs.
    """
    asked = [
        *_attribute_questions(scene, names),
        *_count_questions(scene, rng),
        *_relation_questions(scene, names, rng, most=None),
        *_place_questions(scene, names, rng, image_size),
    ]
    asked += [_yes_no_question(scene, names, rng) for _ in range(2)]
    return [asked[i] for i in rng.permutation(len(asked))]


def _unique(scene: Scene, attribute: str) -> list[SceneObject]:
    values = [getattr(o, attribute) for o in scene.objects]
    return [o for o in scene.objects if values.count(getattr(o, attribute)) == 1]


def _attribute_questions(scene: Scene, names: Sequence[str]) -> list[Question]:
    named = [(COLOR_NAMES[o.color], names[o.name]) for o in _unique(scene, "color")]
    asked = [Question("shape", f"what is the {color} thing ?", name) for color, name in named]
    for o in _unique(scene, "name"):
        color = COLOR_NAMES[o.color]
        asked.append(Question("color", f"what color is the {names[o.name]} ?", color))
    return asked


def _count_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    count = len(scene.objects)
    if rng.random() > _ASK_COUNT[count]:
        return []
    return [Question("count", "how many things are there ?", NUMBER_WORDS[count])]


def _relation_questions(
    scene: Scene, names: Sequence[str], rng: np.random.Generator, most: int | None = 2
) -> list[Question]:
    pairs = [(a, b) for a, b in permutations(_unique(scene, "name"), 2) if relation(a, b)]
    asked = []
    for i in rng.permutation(len(pairs))[:most]:
        a, b = pairs[i]
        text = f"where is the {names[a.name]} seen from the {names[b.name]} ?"
        asked.append(Question("relation", text, dominant_relation(a, b).split()[0]))
    return asked


def _place_questions(
    scene: Scene, names: Sequence[str], rng: np.random.Generator, image_size: int
) -> list[Question]:
    asked = []
    for o in _unique(scene, "name"):
        if rng.random() < 0.5:
            column, row = place(o, image_size)
            text = f"where is the {names[o.name]} ?"
            asked.append(Question("place", text, f"{COLUMNS[column]} {ROWS[row]}"))
    return asked


def _yes_no_question(scene: Scene, names: Sequence[str], rng: np.random.Generator) -> Question:
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
    return Question("yes_no", f"is there {asked} ?", answer)


# ---- benchmark prompts


def benchmark_prompts(
    names: Sequence[str], per_family: int = 25, seed: int = 43
) -> list[dict[str, Any]]:
    """GenEval's six families of prompts over these names, as records of
    `evaluation_metadata.jsonl`.

    Half of the prompts of the families that compose (colors, position, color_attr) hold a
    combination never seen in training. `single_object` has no more prompts than names; they repeat
    until the family is full.
    """
    rng = np.random.default_rng(seed)
    indices = range(len(names))
    pairs = list(permutations(indices, 2))
    groups = list(product(indices, (2, 3, 4)))
    things = list(product(indices, range(len(COLOR_NAMES))))  # (name, color)
    triples = [(a, r, b) for (a, b), r in product(pairs, RELATIONS)]
    two_things = [(a, b) for a, b in product(things, things) if a[0] != b[0] and a[1] != b[1]]
    half_held_out = partial(_half_held_out, rng, per_family)
    alone = [names[n] for n in _sample(rng, indices, per_family)]
    records = [record("single_object", [clause(name)], with_article(name)) for name in alone]
    for a, b in _sample(rng, pairs, per_family):
        phrase = f"{with_article(names[a])} and {with_article(names[b])}"
        records.append(record("two_object", [clause(names[a]), clause(names[b])], phrase))
    for n, count in _sample(rng, groups, per_family):
        phrase, more = f"{NUMBER_WORDS[count]} {plural(names[n])}", clause(names[n], count + 1)
        records.append(record("counting", [clause(names[n], count)], phrase, exclude=[more]))
    for n, c in half_held_out(things, is_held_out_pair):
        thing, phrase = _colored(names[n], COLOR_NAMES[c])
        records.append(record("colors", [thing], phrase))
    for a, r, b in half_held_out(triples, is_held_out_triple):
        include = [clause(names[b]), clause(names[a], position=[r, 0])]
        phrase = f"{with_article(names[a])} {r} {with_article(names[b])}"
        records.append(record("position", include, phrase))
    for pair in half_held_out(two_things, lambda a, b: any(is_held_out_pair(*t) for t in (a, b))):
        clauses, phrases = zip(*(_colored(names[n], COLOR_NAMES[c]) for n, c in pair), strict=True)
        records.append(record("color_attr", list(clauses), " and ".join(phrases)))
    return records


def _sample(rng: np.random.Generator, items: Sequence, count: int) -> list:
    """`count` items in random order, each once before any comes twice."""
    order: list[int] = []
    while len(order) < count:
        order += rng.permutation(len(items)).tolist()
    return [items[i] for i in order[:count]]


def _half_held_out(
    rng: np.random.Generator, count: int, items: list, is_held_out: Callable[..., bool]
) -> list:
    """`count` items, every second of them held out."""
    held_out = [item for item in items if is_held_out(*item)]
    seen = [item for item in items if not is_held_out(*item)]
    new, old = _sample(rng, held_out, count // 2), _sample(rng, seen, count - count // 2)
    mixed = []
    for i, item in enumerate(old):
        mixed += [item, *new[i : i + 1]]
    return mixed


def clause(name: str, count: int = 1, **attributes: Any) -> dict[str, Any]:
    """What GenEval demands of one class of objects."""
    return {"class": name, "count": count, **attributes}


def _colored(name: str, color: str) -> tuple[dict[str, Any], str]:
    return clause(name, color=color), with_article(f"{color} {name}")


def record(
    tag: str, include: list[dict[str, Any]], phrase: str, **exclude: list[dict[str, Any]]
) -> dict[str, Any]:
    """GenEval's metadata of a prompt."""
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {phrase}"}
