"""Every kind of source opens; splits are stable; broken samples are skipped and named."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from vqrae.common.images import open_image
from vqrae.data import image_files
from vqrae.data.emoji import BACKGROUNDS, EmojiDataset
from vqrae.data.image_files import list_images
from vqrae.data.samples import (
    TooManyBrokenSamples,
    fit_image,
    name_hash,
    resized_box,
    split_indices,
)
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.sources import (
    fingerprint,
    open_conversations,
    open_images,
    open_pairs,
    source_kind,
    texts_of,
    vocabulary,
)
from vqrae.data.stream import Draw

Png = Callable[..., bytes]  # see conftest
Make = Callable[..., str]  # see conftest
Capture = pytest.CaptureFixture[str]

KINDS = ["folder", "jsonl", "tar", "hf", "mixture"]
COUNT = 42  # samples of each
ALL: dict[str, Any] = {"image_size": 8, "split": "all"}


def numbers(dataset: Any, count: int = COUNT) -> list[int]:
    return [int(dataset[i]["image"][0, 0, 0]) for i in range(count)]


# ---- names, splits, fingerprints


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("scenes:emojis", ValueError, "Did you mean 'emoji'"),
        ("no/such/folder", FileNotFoundError, "does not exist"),
        ("no/such.jsonl", FileNotFoundError, "does not exist"),
        ("no/such.tar", FileNotFoundError, "no such file"),
        (__file__, ValueError, "unknown kind"),
        ("s3://bucket/pairs.jsonl", ValueError, "only tars are read from URLs"),
        (str(Path(__file__).parent), FileNotFoundError, "holds no image"),
        ("hf:x,imag=y", ValueError, "Did you mean 'image'"),
    ],
)
def test_names_that_cannot_be_opened(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_pairs(source, image_size=8)


def test_splits_are_disjoint_complete_and_depend_on_names_only() -> None:
    names = [f"{i}.png" for i in range(200)]
    hashes = np.array([name_hash(name) for name in names])
    train = split_indices(hashes, "train", "x")
    validation = split_indices(hashes, "validation", "x")
    assert len(validation) == 10
    assert sorted([*train, *validation]) == list(range(200))
    backwards = {names[::-1][i] for i in split_indices(hashes[::-1], "validation", "x")}
    assert backwards == {names[i] for i in validation}
    with pytest.raises(ValueError, match="too few"):
        split_indices(hashes[:1], "train", "x")


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_every_kind_holds_what_was_written(kind: str, make_source: Make, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path / "data")
    assert sorted(numbers(open_images(source, **ALL))) == list(range(COUNT))
    parts = [open_images(source, image_size=8, split=split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [40, 2]
    assert sorted(numbers(parts[0], 40) + numbers(parts[1], 2)) == list(range(COUNT))
    assert len(open_images(source, size=5, **ALL)) == 5
    if kind != "folder":
        pairs = open_pairs(source, **ALL)
        assert [pairs[i]["caption"] for i in range(COUNT)] == [f"number {i}" for i in range(COUNT)]
        expected = ["number 0", "number 20", "number 41"]
        assert [text.strip() for text in texts_of(pairs, 3)] == expected
    before = fingerprint(source)
    assert before == fingerprint(source) != fingerprint(make_source(kind, tmp_path / "other"))


def test_scenes_open_as_every_kind() -> None:
    image = open_images("scenes", image_size=32, size=3)[0]["image"]
    assert image.shape == (3, 32, 32)
    pair = open_pairs("scenes", image_size=32, size=3)[0]
    assert torch.equal(pair["image"], image)
    assert pair["caption"].startswith("a photo of")
    record = open_conversations("scenes", image_size=32, split="validation")[0]
    assert record["conversations"][0]["value"].startswith("<image>")
    assert len(open_images("scenes", image_size=32)) == 1_000_000
    with pytest.raises(ValueError, match="scenes have no end"):
        open_images("scenes", **ALL)
    assert fingerprint("scenes") == "scenes: crc32 77a48183"
    assert {*texts_of(SceneDataset())} < {*vocabulary("scenes*1+emoji*1")}
    assert vocabulary("emoji") == []


# ---- broken samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_sample_is_replaced_counted_and_named(
    kind: str, make_source: Make, tmp_path: Path, capsys: Capture
) -> None:
    dataset = open_images(make_source(kind, tmp_path / "data", broken=(5,)), **ALL)
    seen = Counter(numbers(dataset, len(dataset)) + numbers(dataset, len(dataset)))
    assert seen[5] == 0
    assert seen[7 if kind == "folder" else 6] > seen[0] > 0
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped a broken" in line]
    assert len(told) == 1 + (kind == "mixture"), "once; each part of a mixture names its own"
    assert ("005.png" in told[0]) or ("row 5" in told[0])


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_broken_samples_stop_the_stream(
    kind: str, make_source: Make, tmp_path: Path
) -> None:
    source = make_source(kind, tmp_path / "data", broken=tuple(range(0, COUNT, 3)))
    dataset = open_images(source, **ALL)
    loader = torch.utils.data.DataLoader(dataset, num_workers=int(kind == "tar"))
    with pytest.raises(TooManyBrokenSamples, match=r"(?s)broken, the last: .*Repair or remove"):
        list(loader)


# ---- folders


def test_linked_folders_are_followed_once(png: Png, tmp_path: Path) -> None:
    for name in ("elsewhere/a/0.png", "elsewhere/a/deep/1.png", "data/own/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    for link, target in {
        "data/a": "elsewhere/a",
        "data/again": "elsewhere/a",
        "data/alias": "data/own",
        "data/own/loop": "data",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path / "data")]
    assert found == ["data/a/0.png", "data/a/deep/1.png", "data/own/2.png"]


def test_a_folder_with_pipes_dead_links_odd_names_and_a_locked_folder(
    png: Png, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name in ("0.png", "1.png", "2.png", "3.png", os.fsdecode(b"caf\xe9.png")):
        (tmp_path / name).write_bytes(png(0))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    for name in ("escape\x1b[31m.png", "phone.heic"):
        (tmp_path / name).write_bytes(b"")
    walk = os.walk

    def refuse(top: str, onerror: Callable[[OSError], None]) -> object:
        onerror(PermissionError(13, "Permission denied", f"{top}/locked"))
        return walk(top)

    monkeypatch.setattr(image_files.os, "walk", refuse)
    dataset = open_images(str(tmp_path), **ALL)
    assert len([dataset[i] for i in range(len(dataset))]) == 8
    assert len(dataset.broken.found) == 3
    told = capsys.readouterr().err
    for message in (
        "pipe.png: cannot be read (not a regular file)",
        "dead.png: no such file",
        "escape\\x1b[31m.png",
        "left out what cannot be read here: 1 .heic",
        "locked is left out: Permission denied",
    ):
        assert message in told
    assert fingerprint(str(tmp_path)).startswith(f"{tmp_path}: 8 images")


# ---- crops, filters, drafts


def test_the_random_crop_keeps_the_whole_shorter_edge() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (20, 200, 3))
    for pixels, axis in ((ramp, 2), (ramp.transpose(1, 0, 2), 1)):
        image = fit_image(Image.fromarray(pixels), 20, "random", np.random.default_rng(0))
        steps = image.int().diff(dim=axis)
        assert (steps == 1).all(), "unscaled, from anywhere along the longer edge"


def test_filters_leave_images_out_without_counting_them_as_broken(png: Png, tmp_path: Path) -> None:
    sizes = [(40, 40), (20, 40), (40, 100), *[(10, 10)] * 20, (60, 50)]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i:02d}.png").write_bytes(png(i, size))
    dataset = open_images(str(tmp_path), min_edge=30, max_aspect=2, **ALL)
    assert numbers(dataset, 24) == [0, *[23] * 23]
    assert (dataset.broken.found, len(dataset.unwanted)) == (set(), 22)
    with pytest.raises(TooManyBrokenSamples, match="24 are left out by the filters"):
        open_images(str(tmp_path), min_edge=200, **ALL)[0]


@pytest.mark.parametrize("crop", ["center", "zoom"])
def test_draft_decoding_shows_the_same_image(tmp_path: Path, crop: str) -> None:
    pixels = np.full((500, 600, 3), 90, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, 600, dtype=np.uint8)
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=95)
    options = {"image_size": 64, "split": "all", "crop": crop}
    whole, draft = (open_images(str(tmp_path), draft=d, **options) for d in (False, True))
    difference = (whole[0]["image"].float() - draft[0]["image"].float()).abs()
    assert difference.mean() < 2
    assert draft.draft == (80 if crop == "zoom" else 64)  # a zoom keeps 80 % of the edge
    assert min(open_image(tmp_path / "0.jpg", draft=draft.draft).size) == 125


@pytest.mark.parametrize("size", [(64, 48), (50, 50), (100, 20)])
def test_resized_crops_are_as_large_as_torchvisions(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([resized_box(size, rng) for _ in range(500)])
    shape = (3, size[1], size[0])
    torch.manual_seed(0)
    crops = [
        RandomResizedCrop.get_params(torch.empty(shape), [0.9, 1.0], [3 / 4, 4 / 3])
        for _ in range(500)
    ]
    theirs = np.array(crops)  # top, left, height, width
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= size).all()
    extents = boxes[:, 2:] - boxes[:, :2]
    np.testing.assert_allclose(extents.mean(0), theirs[:, :1:-1].mean(0), atol=0.5)
    np.testing.assert_allclose(boxes[:, :2].mean(0), theirs[:, 1::-1].mean(0), atol=0.5)


# ---- caption files


ODD_LINES = [
    b"[" * 100_000,
    b'{"image": 5, "caption": "x"}',
    b'{"image": "0.png", "caption": "\\ud800"}',
    b'{"image": "0.png", "caption": "caf\xe9"}',
    b'{"image": "0.png"}',
    b"null",
]


def test_odd_captions_are_left_out_by_name_and_many_refused(
    png: Png, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    good = json.dumps({"image": "0.png", "caption": "a \u2028 line"}, ensure_ascii=False).encode()
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([*[good] * 114, b"", *ODD_LINES]))
    pairs = open_pairs(str(path), **ALL)
    assert (len(pairs), pairs[0]["caption"]) == (114, "a \u2028 line")
    assert "6 of 120 entries cannot be used and are left out" in capsys.readouterr().err
    path.write_bytes(b"\n".join([*[good] * 113, *ODD_LINES]))
    message = r"(?s)6 of 119 entries.*--write-clean.*line 114: JSON that is nested too deeply"
    with pytest.raises(ValueError, match=message):
        open_pairs(str(path), **ALL)
    missing = [b'{"image": "no%d.png", "caption": "x"}' % i for i in range(8)]
    path.write_bytes(b"\n".join([good, *missing]))
    message = r"(?s)8 of 9 images do not exist.*no0\.png.*and 3 more"
    with pytest.raises(FileNotFoundError, match=message):
        open_pairs(str(path), **ALL)


# ---- Hugging Face data sets


def test_columns_are_found_or_named(png: Png, tmp_path: Path) -> None:
    def save(name: str, **columns: Any) -> str:
        table = datasets.Dataset.from_dict(columns)
        for column, values in columns.items():
            if isinstance(values[0], dict):
                table = table.cast_column(column, datasets.Image())
        table.save_to_disk(tmp_path / name)
        return f"hf:{tmp_path / name}"

    images = [{"bytes": png(i), "path": None} for i in range(4)]
    lists = [[f"first {i}", f"second {i}"] for i in range(4)]
    pairs = open_pairs(save("one", label=[*range(4)], photo=images, captions=lists), **ALL)
    found = [pairs[Draw(2, epoch)]["caption"] for epoch in range(3)]
    assert found == ["first 2", "second 2", "first 2"]

    source = save("two", left=images, right=images, title=[f"title {i}" for i in range(4)])
    for options, message in (
        ("", r"columns left, right hold images.*,image=COLUMN"),
        (",image=left", r"no caption column among .*,caption=COLUMN"),
        (",image=left,caption=titel", r"no column 'titel'\. Did you mean 'title'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pairs(f"{source}{options}", **ALL)
    assert open_pairs(f"{source},image=left,caption=title", **ALL)[1]["caption"] == "title 1"


def test_parquet_files_and_folders_of_images(
    png: Png, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "parquet"
    folder.mkdir()
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    table = datasets.Dataset.from_dict({"image": images, "text": ["x"] * 3})
    for split in ("train", "test"):
        table.to_parquet(folder / f"{split}.parquet")
    assert numbers(open_images(f"hf:{folder}", **ALL), 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="has the splits train, test: name one"):
        open_images(f"hf:{folder},split=val", image_size=8)
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    rows = "file_name,text\n0.png,zero\n1.png,one\n2.png,two\n"
    (tmp_path / "images" / "metadata.csv").write_text(rows)
    assert open_pairs(f"hf:{tmp_path / 'images'}", **ALL)[2]["caption"] == "two"
    (folder / "train.parquet").write_bytes(b"nothing")
    with pytest.raises((ValueError, OSError)):
        open_images(f"hf:{folder}", image_size=8)
    with pytest.raises(OSError, match="nobody/nothing"):  # offline
        open_images("hf:nobody/nothing", image_size=8)


# ---- emoji


def test_emoji_are_named_split_by_name_and_put_on_colours() -> None:
    everything = EmojiDataset(image_size=72, captions=True, split="all")
    names = [name for _, name in everything.emoji]
    assert len(names) == len(set(names)) == 4009
    assert {"hot dog", "flag of Japan", "woman golfing dark skin tone"} <= set(names)
    train, validation = (EmojiDataset(image_size=72, split=s) for s in ("train", "validation"))
    assert {*train.emoji} | {*validation.emoji} == {*everything.emoji}
    assert len(train) + len(validation) == 4009
    toned = [name for _, name in validation.emoji if name.endswith("skin tone")]
    bases = {name.partition(" skin tone")[0].rsplit(" ", 1)[0] for name in toned}
    shared = bases & {name for _, name in train.emoji}
    assert len(shared) <= 1, "variants stay together (the group at the boundary may be cut)"

    index = names.index("hot dog")
    sample, later = everything[index], everything[Draw(index, epoch=1)]
    colour = sample["caption"].removeprefix("hot dog on a ").removesuffix(" background")
    assert tuple(sample["image"][:, 0, 0].tolist()) == BACKGROUNDS[colour]
    assert later["caption"] != sample["caption"]
    assert torch.equal(everything[index]["image"], sample["image"])


# ---- captions in tars


def test_odd_captions_in_tars(png: Png, tmp_path: Path, capsys: Capture) -> None:
    texts: list[dict[str, Any]] = [
        {"txt": "zero"},
        {"txt": "  "},
        {"txt": b"\xef\xbb\xbfa cat"},
        {"json": b"{"},
        {"txt": b"caf\xe9"},
        {"json": b'{"caption": "\\ud800"}'},
        {"json": b'\xef\xbb\xbf{"prompt": "a dog"}'},
        {"json": {"title": "by name"}},
        {},
    ]
    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as writer:
        for i, text in enumerate(texts):
            writer.write({"__key__": str(i), "png": png(i), **text})
    pairs = open_pairs(path, **ALL)
    assert len(pairs) == 8, "an image without any text is left out"
    expected = ["zero", "a cat", "a cat", *["a dog"] * 4, "zero"]
    assert [pairs[i]["caption"] for i in range(8)] == expected
    told = capsys.readouterr().err
    assert "1 of 9 images have no caption" in told
    assert told.count("has no readable caption") == 5
    assert open_pairs(f"{path},caption=title", **ALL)[7]["caption"] == "by name"
    assert len(open_images(path, **ALL)) == 9
    with webdataset.TarWriter(path) as writer:
        writer.write({"__key__": "a", "png": png(0)})
    with pytest.raises(ValueError, match="no caption"):
        open_pairs(path, **ALL)


def test_stored_bytes_are_decoded_exactly(png: Png, tmp_path: Path) -> None:
    data = png(1, (20, 14), noise=True)
    (tmp_path / "a.png").write_bytes(data)
    image = open_images(str(tmp_path), image_size=14, split="all")[0]["image"]
    expected = open_image(io.BytesIO(data)).crop((3, 0, 17, 14))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(expected))
    assert source_kind(str(tmp_path)) == "folder"
