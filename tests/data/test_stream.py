"""The order of samples: sharding, resume and mixtures are functions of seed and position alone."""

import itertools
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vqrae.data import samples
from vqrae.data.sources import fingerprint, open_conversations, open_images, open_pairs, source_kind
from vqrae.data.stream import (
    Draw,
    GroupedSampler,
    Mixture,
    StreamSampler,
    parse_mixture,
    shuffled,
)

KINDS = ["folder", "jsonl", "tar", "hf", "mixture"]
COUNT = 42  # samples of each


def images_of(dataset: Any, count: int, *, workers: int = 0, **order: int) -> list[torch.Tensor]:
    """The first images of a stream, as training would get them."""
    indices = list(itertools.islice(StreamSampler(dataset, seed=5, **order), count))
    loader = DataLoader(dataset, 3, sampler=indices, num_workers=workers)
    return [image for batch in loader for image in batch["image"]]


def numbers(images: list[torch.Tensor]) -> list[int]:
    return [int(image[0, 0, 0]) for image in images]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_workers_and_a_resume_see_what_one_process_sees(
    kind: str, make_source: Callable[..., str], tmp_path: Path
) -> None:
    source = make_source(kind, tmp_path / "data", broken=(3,))
    dataset = open_images(source, image_size=8, split="all", crop="zoom")
    whole = images_of(dataset, 2 * COUNT)
    for rank in range(2):
        share = images_of(dataset, COUNT, workers=2, rank=rank, world_size=2)
        assert torch.equal(torch.stack(share), torch.stack(whole[rank::2]))
    resumed = open_images(source, image_size=8, split="all", crop="zoom")
    assert torch.equal(
        torch.stack(images_of(resumed, 27, start=57)), torch.stack(whole[57 : 57 + 27])
    )
    if kind != "mixture":
        first, second = numbers(whole[:COUNT]), numbers(whole[COUNT:])
        assert set(first) == {*range(COUNT)} - {3}
        assert Counter(first) == Counter(second)
        assert first != second


def test_every_process_decodes_its_own_samples_only(
    make_source: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, open_image = tmp_path / "decoded.log", samples.open_image

    def counted(source: Any, *, name: str, **options: Any) -> Image.Image:
        # Workers are processes: appending is atomic.
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{name}\n".encode())
        os.close(descriptor)
        return open_image(source, name=name, **options)

    monkeypatch.setattr(samples, "open_image", counted)
    dataset = open_images(make_source("tar", tmp_path / "data"), image_size=8, split="all")
    for rank in range(2):
        images_of(dataset, COUNT // 2, workers=2, rank=rank, world_size=2)
        assert len(log.read_text().splitlines()) == (rank + 1) * COUNT // 2
    assert set(Counter(log.read_text().splitlines()).values()) == {1}


def test_crops_depend_on_seed_epoch_and_index_alone(
    png: Callable[..., bytes], tmp_path: Path
) -> None:
    copy = pickle.loads(pickle.dumps(Draw(3, epoch=2)))
    assert (copy, copy.epoch) == (3, 2), "an index keeps its epoch on the way to a worker"
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i, (60, 40), noise=True))
    options = {"image_size": 16, "split": "all", "crop": "zoom"}
    dataset, other = (open_images(str(tmp_path), **options) for _ in range(2))
    epochs = [dataset[Draw(0, epoch)]["image"] for epoch in range(2)]
    assert not torch.equal(*epochs)
    other[1]  # reading in another order changes nothing
    assert torch.equal(other[0]["image"], epochs[0])
    other.set_epoch(1)
    assert torch.equal(other[0]["image"], epochs[1])
    assert not torch.equal(open_images(str(tmp_path), seed=1, **options)[0]["image"], epochs[0])


# ---- mixtures


class Numbers(torch.utils.data.Dataset):
    """(name, index) as a data set."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, int]:
        assert 0 <= index < self.size
        return self.name, int(index)


def stream(mixture: Mixture, count: int) -> list[tuple[str, int]]:
    return [mixture[draw] for draw in itertools.islice(StreamSampler(mixture), count)]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (27, 5, 4), (0.333, 0.666, 0.001), (1,)])
def test_proportions_hold_in_every_window(weights: tuple[float, ...]) -> None:
    mixture = Mixture([Numbers(str(i), 50) for i in range(len(weights))], weights, size=2000)
    parts = np.array([int(name) for name, _ in stream(mixture, 2000)])
    for i, weight in enumerate(weights):
        error = np.cumsum((parts == i) - weight / sum(weights))
        assert error.max() - error.min() < 10, "samples more or less than its share"


def test_every_part_is_seen_whole_before_it_repeats() -> None:
    mixture = Mixture([Numbers("a", 37), Numbers("b", 100)], [0.5, 0.5], seed=1)
    assert 195 < len(mixture) < 205
    seen = stream(mixture, 1000)
    for name, size in {"a": 37, "b": 100}.items():
        own = [index for part, index in seen if part == name]
        rounds = [own[i : i + size] for i in range(0, len(own) - size, size)]
        assert all(sorted(order) == list(range(size)) for order in rounds)
        assert rounds[0] != rounds[1]
    assert len({mixture[i] for i in range(len(mixture))}) == 137, "an epoch holds every sample"

    once = Mixture([Numbers("a", 1000), Numbers("b", 50)], [0.5, 0.5], repeat=False)
    seen = stream(once, len(once))
    assert len(set(seen)) == len(seen) > 90, "a validation mixture repeats nothing"


def test_the_order_of_a_mixture_depends_on_the_seed_alone() -> None:
    parts = [Numbers("a", 1000), Numbers("b", 50)]
    first, second, other = (stream(Mixture(parts, [2, 1], seed=seed), 300) for seed in (1, 1, 2))
    assert first == second != other
    shares = [sum(name == "a" for name, _ in first[rank::2]) for rank in range(2)]
    assert min(shares) > 80, "a schedule of period 2 must not give each process its own part"


@pytest.mark.parametrize("size", [1, 3, 64, 65, 1000])
def test_shuffled_is_a_permutation(size: int) -> None:
    order = [shuffled(i, size, 3) for i in range(size)]
    assert sorted(order) == list(range(size))
    if size > 10:
        assert order != sorted(order)
        assert order != [shuffled(i, size, 4) for i in range(size)]


def test_mixtures_by_name() -> None:
    parts = parse_mixture("a+b/part-*.tar*0.5 + emoji*.25+hf:x/y,split=test*1")
    assert [name for name, _ in parts] == ["a+b/part-*.tar", "emoji", "hf:x/y,split=test"]
    assert [float(weight) for _, weight in parts] == [0.5, 0.25, 1]
    for name in ("part-*.tar", "scenes+emoji", "scenes*0.5+emoji"):
        assert parse_mixture(name) == []
    with pytest.raises(FileNotFoundError, match="each part of a mixture needs its weight"):
        source_kind("scenes+emoji")
    with pytest.raises(ValueError, match="expected a positive one"):
        open_images("scenes*0+emoji*1", image_size=8)
    with pytest.raises(ValueError, match="at most four decimals"):
        open_images("scenes*0.00001+emoji*1", image_size=8)
    pairs = open_pairs("scenes*0.5+emoji*0.5", image_size=32, size=8)
    assert sum("background" in pairs[i]["caption"] for i in range(8)) in range(1, 8)
    both = open_conversations("scenes*1+scenes:emoji*1", image_size=64, split="validation")
    assert len(both) > 1900
    assert fingerprint("scenes*2+emoji*1").startswith("2 of scenes: crc32")


# ---- grouped sampling


def test_grouped_batches_hold_one_modality_and_are_balanced() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 500, 1000) * np.where(rng.random(1000) < 0.3, -1, 1)
    sampler = GroupedSampler(lengths, micro_batch_size=4, micro_batches=8)
    order = np.array(list(sampler))
    assert sorted(order) == list(range(1000))
    steps = lengths[order[: 1000 // 32 * 32]].reshape(-1, 32)
    mixed = [step for step in steps if len(set(np.sign(step))) > 1]
    assert len(mixed) <= 1  # the rest of both
    assert set(np.sign(steps[:, 0])) == {-1, 1}
    totals = np.abs(steps[:-2]).reshape(-1, 8, 4).sum(-1)
    assert np.median(totals.max(1) / totals.min(1)) < 1.2
    assert list(sampler) == list(order)
    sampler.set_epoch(1)
    assert list(sampler) != list(order)


def test_lengths_of_a_mixture_are_those_of_its_samples(tmp_path: Path) -> None:
    answer, records = {"from": "gpt", "value": "y"}, []
    for words in (1, 5, 9):
        question = {"from": "human", "value": "x " * words}
        records.append({"conversations": [question, answer]})
    (tmp_path / "text.json").write_text(json.dumps(records))
    source = f"{tmp_path / 'text.json'}*0.5+scenes*0.5"
    mixture = open_conversations(source, image_size=64, size=20)
    for index, length in enumerate(mixture.modality_lengths()):
        record = mixture[index]
        text = " ".join(turn["value"] for turn in record["conversations"])
        assert length == (1 if "image" in record else -len(text.split()))
