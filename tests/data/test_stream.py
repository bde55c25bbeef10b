"""Who decodes what: each sample once over processes and loader workers, exact resume, broken samples; for every kind."""

import itertools
import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from vqrae.data import samples as encoded
from vqrae.data.emoji import BACKGROUNDS, EmojiDataset
from vqrae.data.samples import TooManyBrokenSamples
from vqrae.data.sources import fingerprint, open_conversations, open_images, open_pairs, source_kind
from vqrae.data.stream import Draw, Mixture, StreamSampler, parse_mixture, shuffled

COUNT = 42


def png(index: int) -> bytes:
    """An image that says its number: 4 x 3 px of one colour."""
    stream = encoded.io.BytesIO()
    Image.new("RGB", (4, 3), (index, 7, 255 - index)).save(stream, "PNG")
    return stream.getvalue()


def make_source(kind: str, folder: Path, broken: tuple[int, ...] = ()) -> str:
    """Write `COUNT` images as a source of a kind; those in `broken` are cut short."""
    files = [png(i)[: 40 if i in broken else None] for i in range(COUNT)]
    if kind == "tar":
        with webdataset.ShardWriter(str(folder / "part-%d.tar"), maxcount=16, verbose=0) as writer:
            for i, data in enumerate(files):
                writer.write({"__key__": f"{i:03d}", "png": data, "txt": f"number {i}"})
        return str(folder / "part-{0..2}.tar")
    if kind == "hf":
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        table = {
            "image": [{"bytes": data, "path": None} for data in files],
            "text": [f"number {i}" for i in range(COUNT)],
        }
        datasets.Dataset.from_dict(table, features=features).save_to_disk(folder / "hf")
        return f"hf:{folder / 'hf'}"
    if kind == "mixture":
        parts = []
        for part in ("tar", "hf"):
            (folder / part).mkdir()
            parts.append(make_source(part, folder / part, broken))
        return f"{parts[0]}*0.75+{parts[1]}*0.25"
    for i, data in enumerate(files):
        (folder / f"{i:03d}.png").write_bytes(data)
    if kind == "jsonl":
        lines = [
            json.dumps({"image": f"{i:03d}.png", "caption": f"number {i}"}) for i in range(COUNT)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
        return str(folder / "pairs.jsonl")
    return str(folder)


SOURCES = ["folder", "jsonl", "tar", "hf", "mixture"]


def drawn(
    dataset: Any, samples: int, *, workers: int = 0, batch_size: int = 3, **order: int
) -> list[torch.Tensor]:
    """The first samples of a stream, as training would get them; each says its number in its first channel."""
    indices = list(itertools.islice(StreamSampler(dataset, seed=5, **order), samples))
    loader = DataLoader(dataset, batch_size, sampler=indices, num_workers=workers)
    return [image for batch in loader for image in batch["image"]]


def numbers(images: list[torch.Tensor]) -> list[int]:
    return [int(image[0, 0, 0]) for image in images]


# ---- sharding and resume


@pytest.mark.parametrize("kind", SOURCES)
def test_two_processes_with_two_workers_see_what_one_process_sees(
    kind: str, tmp_path: Path
) -> None:
    dataset = open_images(make_source(kind, tmp_path), image_size=8, split="all", crop="zoom")
    samples = 2 * COUNT
    alone = drawn(dataset, samples)
    shares = [drawn(dataset, samples // 2, workers=2, rank=rank, world_size=2) for rank in range(2)]
    for i, image in enumerate(alone):
        assert torch.equal(shares[i % 2][i // 2], image)
    if kind != "mixture":
        first, second = numbers(alone[:COUNT]), numbers(alone[COUNT:])
        assert sorted(first) == sorted(second) == list(range(COUNT))
        assert first != second
        assert not set(numbers(shares[0][: COUNT // 2])) & set(numbers(shares[1][: COUNT // 2]))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_resumed_stream_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path, broken=(3,))
    expected = drawn(open_images(source, image_size=8, crop="zoom"), 100)
    for workers in (0, 2):
        resumed = drawn(
            open_images(source, image_size=8, crop="zoom"), 100 - 57, workers=workers, start=57
        )
        assert torch.equal(torch.stack(resumed), torch.stack(expected[57:]))


def test_every_process_decodes_its_own_samples_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, open_image = tmp_path / "decoded.log", encoded.open_image

    def counted(source: Any, *, name: str, **options: Any) -> Image.Image:
        descriptor = os.open(
            log, os.O_WRONLY | os.O_APPEND | os.O_CREAT
        )  # workers are processes: appending is atomic
        os.write(descriptor, f"{name}\n".encode())
        os.close(descriptor)
        return open_image(source, name=name, **options)

    monkeypatch.setattr(encoded, "open_image", counted)
    dataset = open_images(make_source("tar", tmp_path), image_size=8, split="all")
    for rank in range(2):
        drawn(dataset, COUNT // 2, workers=2, rank=rank, world_size=2)
        assert len(log.read_text().splitlines()) == (rank + 1) * COUNT // 2
    assert set(Counter(log.read_text().splitlines()).values()) == {1}


def test_an_index_keeps_its_epoch_on_the_way_to_a_worker() -> None:
    copy = pickle.loads(pickle.dumps(Draw(3, epoch=2)))
    assert (copy, copy.epoch) == (3, 2)


def test_crops_differ_between_epochs_of_a_stream(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    dataset = open_images(str(tmp_path), image_size=16, split="all", crop="zoom")
    first, second, third = drawn(dataset, 3, workers=1)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(dataset[0]["image"], first)


def test_the_random_crop_keeps_the_whole_shorter_edge() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (20, 200, 3))
    image = encoded.fit_image(Image.fromarray(ramp), 20, "random", np.random.default_rng(0))
    assert [int(v) for v in image[0, 0].diff()] == [
        1
    ] * 19  # unscaled, from anywhere along the longer edge
    upright = encoded.fit_image(
        Image.fromarray(ramp.transpose(1, 0, 2)), 20, "random", np.random.default_rng(0)
    )
    assert [int(v) for v in upright[0, :, 0].diff()] == [1] * 19


# ---- broken samples


@pytest.mark.parametrize("kind", SOURCES)
def test_a_broken_sample_is_replaced_counted_and_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_images(make_source(kind, tmp_path, broken=(5,)), image_size=8, split="all")
    seen = Counter(numbers(drawn(dataset, COUNT if kind != "mixture" else 4 * COUNT)))
    assert seen[5] == 0
    assert seen[6] >= 2  # once for itself, once for its neighbour
    [line, *more] = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "skipped a broken sample (1 of" in line
    ]
    assert ("005.png" in line) or ("row 5" in line)
    assert len(more) == (kind == "mixture")  # each part names its own


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in SOURCES), ("tar", 1)])
def test_too_many_broken_samples_stop_the_stream(kind: str, workers: int, tmp_path: Path) -> None:
    dataset = open_images(
        make_source(kind, tmp_path, broken=tuple(range(0, COUNT, 3))), image_size=8, split="all"
    )
    with pytest.raises(TooManyBrokenSamples, match=r"(?s)broken, the last: .*Repair or remove"):
        drawn(dataset, 4 * COUNT, workers=workers)


def test_a_pair_without_a_caption_is_a_broken_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        {"txt": "zero"},
        {"txt": "  "},
        {"json": b"{"},
        {"json": {"prompt": "three"}},
        {"json": {"title": "four"}},
    ]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, text in enumerate(texts):
            writer.write({"__key__": str(i), "png": png(i), **text})
    pairs = open_pairs(str(tmp_path / "a.tar"), image_size=8, split="all")
    assert [pairs[i]["caption"] for i in range(5)] == ["zero", "three", "three", "three", "zero"]
    assert capsys.readouterr().err.count("has no readable caption") == 3
    named = open_pairs(f"{tmp_path / 'a.tar'},caption=title", image_size=8, split="all")
    assert named[4]["caption"] == "four"
    assert len(open_images(str(tmp_path / "a.tar"), image_size=8, split="all")) == 5


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


def stream(mixture: Mixture, samples: int) -> list[tuple[str, int]]:
    return [mixture[draw] for draw in itertools.islice(StreamSampler(mixture), samples)]


@pytest.mark.parametrize(
    "weights", [(0.5, 0.5), (0.7, 0.2, 0.1), (27, 5, 4), (0.333, 0.666, 0.001), (1,)]
)
def test_proportions_hold_in_every_window(weights: tuple[float, ...]) -> None:
    mixture = Mixture([Numbers(str(i), 50) for i in range(len(weights))], weights, size=4000)
    parts = np.array([int(name) for name, _ in stream(mixture, 4000)])
    for i, weight in enumerate(weights):
        error = np.cumsum((parts == i) - weight / sum(weights))
        assert error.max() - error.min() < 10, (
            "a window holds up to ten samples more or less than its share"
        )


def test_every_part_is_seen_whole_before_it_repeats() -> None:
    mixture = Mixture([Numbers("a", 37), Numbers("b", 100)], [0.5, 0.5], seed=1)
    assert 195 < len(mixture) < 205
    samples = stream(mixture, 1000)
    for name, size in {"a": 37, "b": 100}.items():
        own = [index for part, index in samples if part == name]
        rounds = [own[i : i + size] for i in range(0, len(own) - size, size)]
        assert all(sorted(order) == list(range(size)) for order in rounds)
        assert rounds[0] != rounds[1]
    assert {mixture[i] for i in range(len(mixture))} == {("a", i) for i in range(37)} | {
        ("b", i) for i in range(100)
    }


def test_the_order_of_a_mixture_depends_on_the_seed_alone() -> None:
    parts = [Numbers("a", 1000), Numbers("b", 50)]
    first, second, other = (stream(Mixture(parts, [2, 1], seed=seed), 300) for seed in (1, 1, 2))
    assert first == second != other
    even, odd = (sum(name == "a" for name, _ in first[rank::2]) for rank in range(2))
    assert min(even, odd) > 80, (
        "a schedule of period 2 must not give each of two processes its own part"
    )


def test_a_validation_mixture_repeats_nothing() -> None:
    mixture = Mixture([Numbers("a", 1000), Numbers("b", 50)], [0.5, 0.5], repeat=False)
    samples = stream(mixture, len(mixture))
    assert len(set(samples)) == len(samples) > 90


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 65, 1000])
def test_shuffled_is_a_permutation(size: int) -> None:
    order = [shuffled(i, size, 3) for i in range(size)]
    assert sorted(order) == list(range(size))
    if size > 10:
        assert order != sorted(order)
        assert order != [shuffled(i, size, 4) for i in range(size)]


def test_mixtures_by_name(tmp_path: Path) -> None:
    parts = parse_mixture("a+b/part-*.tar*0.5 + emoji*.25+hf:x/y,split=test*1")
    assert [(name, float(weight)) for name, weight in parts] == [
        ("a+b/part-*.tar", 0.5),
        ("emoji", 0.25),
        ("hf:x/y,split=test", 1),
    ]
    assert (
        parse_mixture("part-*.tar")
        == parse_mixture("scenes+emoji")
        == parse_mixture("scenes*0.5+emoji")
        == []
    )
    with pytest.raises(FileNotFoundError, match="each part of a mixture needs its weight"):
        source_kind("scenes+emoji")
    with pytest.raises(ValueError, match="expected a positive one"):
        open_images("scenes*0+emoji*1", image_size=8)
    with pytest.raises(ValueError, match="at most four decimals"):
        open_images("scenes*0.00001+emoji*1", image_size=8)

    pairs = open_pairs("scenes*0.5+emoji*0.5", image_size=32, size=8)
    assert len(pairs) == 8
    assert sum("background" in pairs[i]["caption"] for i in range(8)) in range(1, 8)
    assert (
        len(open_conversations("scenes*1+scenes:emoji*1", image_size=64, split="validation")) > 1900
    )
    assert fingerprint("scenes*2+emoji*1").startswith("2 of scenes: crc32")


# ---- Hugging Face data sets


def save_table(folder: Path, **columns: Any) -> str:
    images = [{"bytes": png(i), "path": None} for i in range(COUNT)]
    kinds = {
        name: datasets.Image() if values == "images" else None for name, values in columns.items()
    }
    table = datasets.Dataset.from_dict(
        {n: images if v == "images" else v for n, v in columns.items()}
    )
    for name, kind in kinds.items():
        table = table.cast_column(name, kind) if kind else table
    table.save_to_disk(folder)
    return f"hf:{folder}"


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    lists = [[f"first {i}", f"second {i}"] for i in range(COUNT)]
    source = save_table(tmp_path / "one", label=list(range(COUNT)), photo="images", captions=lists)
    pairs = open_pairs(source, image_size=8, split="all")
    assert (len(pairs), pairs[2]["caption"], pairs[Draw(2, 1)]["caption"]) == (
        COUNT,
        "first 2",
        "second 2",
    )
    assert [
        len(open_images(source, image_size=8, split=split)) for split in ("train", "validation")
    ] == [40, 2]

    source = save_table(
        tmp_path / "two", left="images", right="images", title=[f"title {i}" for i in range(COUNT)]
    )
    with pytest.raises(ValueError, match=r"columns left, right hold images.*,image=COLUMN"):
        open_images(source, image_size=8)
    with pytest.raises(ValueError, match=r"no caption column among .*,caption=COLUMN"):
        open_pairs(f"{source},image=left", image_size=8)
    with pytest.raises(ValueError, match=r"no column 'titel'\. Did you mean 'title'"):
        open_pairs(f"{source},image=left,caption=titel", image_size=8)
    with pytest.raises(ValueError, match="Did you mean 'image'"):
        open_pairs(f"{source},imag=left", image_size=8)
    assert (
        open_pairs(f"{source},image=left,caption=title", image_size=8, split="all")[1]["caption"]
        == "title 1"
    )


def test_parquet_files_and_folders_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stored = datasets.load_from_disk(
        save_table(tmp_path / "disk", image="images", text=["x"] * COUNT).removeprefix("hf:")
    )
    (tmp_path / "parquet").mkdir()
    stored.to_parquet(tmp_path / "parquet" / "train.parquet")
    stored.to_parquet(tmp_path / "parquet" / "test.parquet")
    assert numbers(
        [open_images(f"hf:{tmp_path / 'parquet'}", image_size=8, split="all")[7]["image"]]
    ) == [7]
    with pytest.raises(ValueError, match="has the splits train, test: name one"):
        open_images(f"hf:{tmp_path / 'parquet'},split=val", image_size=8)
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "images" / "metadata.csv").write_text(
        "file_name,text\n0.png,zero\n1.png,one\n2.png,two\n"
    )
    assert open_pairs(f"hf:{tmp_path / 'images'}", image_size=8, split="all")[2]["caption"] == "two"
    (tmp_path / "parquet" / "train.parquet").write_bytes(b"nothing")
    with pytest.raises((ValueError, OSError)):
        open_images(f"hf:{tmp_path / 'parquet'}", image_size=8)
    with pytest.raises(OSError, match="nobody/nothing"):  # offline
        open_images("hf:nobody/nothing", image_size=8)


# ---- emoji


def test_emoji_are_named_split_by_name_and_laid_on_colours() -> None:
    everything = EmojiDataset(image_size=72, captions=True, split="all")
    names = [name for _, name in everything.emoji]
    assert len(names) == len(set(names)) == 4009
    assert {"hot dog", "flag of Japan", "woman golfing dark skin tone"} <= set(names)
    train, validation = (
        open_images("emoji", image_size=72, split=split) for split in ("train", "validation")
    )
    assert {*train.emoji} | {*validation.emoji} == {*everything.emoji}
    assert len(train) + len(validation) == 4009
    base = {
        name.partition(" skin tone")[0].rsplit(" ", 1)[0]
        for _, name in validation.emoji
        if name.endswith("skin tone")
    }
    shared = base & {name for _, name in train.emoji}
    assert len(shared) <= 1, (
        "skin tones of one emoji stay on one side (the group at the boundary may be cut)"
    )

    index = names.index("hot dog")
    sample, later = everything[index], everything[Draw(index, epoch=1)]
    colour = sample["caption"].removeprefix("hot dog on a ").removesuffix(" background")
    assert tuple(sample["image"][:, 0, 0].tolist()) == BACKGROUNDS[colour]
    assert later["caption"] != sample["caption"]
    assert torch.equal(everything[index]["image"], sample["image"])
