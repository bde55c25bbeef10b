"""Scenes: reproducible, with held-out combinations, true captions and balanced questions."""

import itertools
from collections import Counter

import numpy as np
import pytest

from vqrae.data.scenes import language
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import (
    COLUMNS,
    FAMILIES,
    ROWS,
    benchmark_prompts,
    relation,
    vocabulary_texts,
)
from vqrae.data.scenes.scene import (
    COLOR_NAMES,
    SceneObject,
    dominant_relation,
    is_held_out,
    is_held_out_pair,
    is_held_out_triple,
)
from vqrae.data.scenes.sprites import SPRITE_SETS, load_sprites
from vqrae.data.word_tokenizer import build_word_tokenizer


@pytest.mark.parametrize("sprites", SPRITE_SETS)
def test_scenes_are_reproducible_and_splits_differ(sprites: str) -> None:
    train, again = (SceneDataset("train", sprites=sprites) for _ in range(2))
    validation = SceneDataset("validation", sprites=sprites)
    for index in range(20):
        assert np.array_equal(train.pixels(index), again.pixels(index))
        assert not np.array_equal(train.pixels(index), validation.pixels(index))
    other = SceneDataset("train", sprites=sprites, seed=1)
    assert not np.array_equal(train.pixels(0), other.pixels(0))
    assert not any(is_held_out(train.scene(i)) for i in range(500))
    held_out = [is_held_out(validation.scene(i)) for i in range(100)]
    assert held_out == [False, True] * 50


def test_held_out_rules_and_relations() -> None:
    names = len(load_sprites().names)
    things = itertools.product(range(names), range(10))
    held = Counter(name for name, color in things if is_held_out_pair(name, color))
    assert held == dict.fromkeys(range(names), 1)
    for a, b in itertools.permutations(range(names), 2):
        assert is_held_out_triple(a, "left of", b) == is_held_out_triple(b, "right of", a)
        assert is_held_out_triple(a, "above", b) == is_held_out_triple(b, "below", a)
    center = SceneObject(0, 0, 10, 30, 30)
    assert relation(SceneObject(1, 0, 10, 10, 32), center) == "left of"
    assert relation(SceneObject(1, 0, 10, 32, 50), center) == "below"
    assert relation(SceneObject(1, 0, 10, 10, 10), center) is None
    assert dominant_relation(SceneObject(1, 0, 10, 10, 12), center) == "left of"


def test_phrases_and_descriptions_name_every_object_and_its_place() -> None:
    dataset = SceneDataset("train", item="grounded_pair")
    for index in range(50):
        sample, scene = dataset[index], dataset.scene(index)
        descriptions = []
        for item, box, phrases in zip(
            scene.objects, sample["boxes"], sample["phrases"], strict=True
        ):
            thing = f"{COLOR_NAMES[item.color]} {dataset.sprites.names[item.name]}"
            center = (box[:2] + box[2:]) / 2
            column, row = (5 * center).int().tolist()
            assert phrases[0].split()[1] == thing.split()[1]
            assert phrases[1].split(maxsplit=1)[1] == thing
            assert phrases[2:] == (f"a thing {COLUMNS[column]}", f"a thing {ROWS[row]}")
            descriptions.append(f"{phrases[1]} {COLUMNS[column]} {ROWS[row]}")
        text = dataset.description(index).removeprefix("a photo of ")
        assert sorted(text.replace(" and a", ", a").split(", ")) == sorted(descriptions)


def test_objects_keep_their_distance() -> None:
    dataset = SceneDataset("train")
    for scene in map(dataset.scene, range(300)):
        assert 1 <= len(scene.objects) <= 4
        for a in scene.objects:
            assert min(a.left, a.top) >= 2
            assert max(a.left, a.top) + a.size <= 62
            assert a.left % 8 == a.top % 8 == 2
        for a, b in itertools.combinations(scene.objects, 2):
            apart_x = max(a.left, b.left) - min(a.left + a.size, b.left + b.size)
            apart_y = max(a.top, b.top) - min(a.top + a.size, b.top + b.size)
            assert max(apart_x, apart_y) >= 4


def test_answers_are_true_and_balanced() -> None:
    dataset = SceneDataset("validation")
    names = dataset.sprites.names
    answers: dict[str, Counter] = {}
    for index in range(400):
        objects = dataset.scene(index).objects
        things = {(names[o.name], COLOR_NAMES[o.color]) for o in objects}
        for question in dataset.questions(index, limit=100):
            answers.setdefault(question.kind, Counter())[question.answer] += 1
            words = question.text.split()
            if question.kind == "shape":
                assert [n for n, c in things if c == words[3]] == [question.answer]
            elif question.kind == "color":
                assert (words[4], question.answer) in things
            elif question.kind == "yes_no":
                assert question.answer == ("yes" if (words[4], words[3]) in things else "no")
    limits = {"shape": 0.2, "color": 0.16, "count": 0.36, "relation": 0.34, "yes_no": 0.57}
    assert set(answers) == set(limits)
    for kind, counts in answers.items():
        assert max(counts.values()) / counts.total() < limits[kind], (kind, counts)


def test_a_lesson_compares_all_pairs_both_ways_and_tells_true_places() -> None:
    dataset, rng = SceneDataset(), np.random.default_rng(0)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    answers: dict[str, list[int]] = {}
    for index in range(200):
        scene, names = dataset.scene(index), dataset.sprites.names
        asked = language.lesson(scene, names, rng, 64)
        words = {tuple(q.text.split()[3::4]): q.answer for q in asked if q.kind == "relation"}
        for (a, b), answer in words.items():
            assert words[b, a] == opposite[answer]
        for question in asked:
            if question.kind == "place":
                (item,) = (o for o in scene.objects if names[o.name] == question.text.split()[3])
                answers.setdefault(question.answer.split(" at the ")[0], []).append(item.center[0])
    assert max(answers["on the far left"]) < min(answers["on the far right"])


@pytest.mark.parametrize("sprites", SPRITE_SETS)
def test_every_word_is_in_the_vocabulary(sprites: str) -> None:
    dataset = SceneDataset("validation", sprites=sprites)
    text_tokenizer = build_word_tokenizer(vocabulary_texts(dataset.sprites.names))
    texts = [record["prompt"] for record in benchmark_prompts(dataset.sprites.names)]
    for index in range(200):
        texts += [dataset.caption(index), dataset.caption(index, detailed=True)]
        texts.append(dataset.description(index))
        turns = dataset.conversation(index)["conversations"]
        texts += [turn["value"].removeprefix("<image>\n") for turn in turns]
    ids = text_tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert text_tokenizer.unk_token_id not in itertools.chain.from_iterable(ids)


def test_benchmark_has_six_families_with_held_out_combinations() -> None:
    names = load_sprites().names
    records = benchmark_prompts(names, per_family=25)
    assert Counter(record["tag"] for record in records) == dict.fromkeys(FAMILIES, 25)
    assert records == benchmark_prompts(names, per_family=25)
    things = [record["include"][0] for record in records if record["tag"] == "colors"]
    pairs = [(names.index(t["class"]), COLOR_NAMES.index(t["color"])) for t in things]
    assert sum(is_held_out_pair(*pair) for pair in pairs) == 12
    first = {record["tag"]: record for record in reversed(records)}
    counting, position = first["counting"], first["position"]
    assert list(counting) == ["tag", "include", "exclude", "prompt"]
    assert counting["exclude"][0]["count"] == counting["include"][0]["count"] + 1
    a, b = position["include"]
    where = f"a photo of a {b['class']} {b['position'][0]} a {a['class']}"
    assert position["prompt"].startswith(where)
