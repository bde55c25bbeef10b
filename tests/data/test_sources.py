"""Sources: every kind opens, splits are disjoint and stable, broken and missing samples are named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image

from vqrae.common.images import open_image
from vqrae.data import tars
from vqrae.data.conversations import IMAGE_TAG, normalize_turns
from vqrae.data.image_files import ImageFolder
from vqrae.data.samples import TooManyBrokenSamples, missing_files, name_hash, split_indices
from vqrae.data.sources import fingerprint, open_conversations, open_images, open_pairs, source_kind
from vqrae.data.stream import GroupedSampler
from vqrae.data.tars import TarDataset, tar_index


def make_image(index: int, size: tuple[int, int] = (20, 14)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(index: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    make_image(index).save(stream, form)
    return stream.getvalue()


def make_folder(folder: Path, count: int) -> Path:
    (folder / "sub").mkdir(parents=True)
    for i in range(count):
        make_image(i).save(folder / ("sub" if i % 2 else "") / f"{i:03d}.png")
    return folder


def make_tar(path: Path, count: int) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(count):
            suffix = ("jpg", "png", "webp")[i % 3]
            form = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix]
            writer.write(
                {"__key__": f"sample{i:04d}", suffix: encoded(i, form), "txt": f"caption {i}"}
            )
    return path


# ---- splits


def test_splits_are_disjoint_complete_and_depend_on_names_only() -> None:
    names = [f"{i}.png" for i in range(200)]
    hashes = np.array([name_hash(name) for name in names])
    train, validation = (
        split_indices(hashes, "train", "x"),
        split_indices(hashes, "validation", "x"),
    )
    assert len(validation) == 10
    assert sorted([*train, *validation]) == list(range(200))
    reversed_validation = {names[::-1][i] for i in split_indices(hashes[::-1], "validation", "x")}
    assert reversed_validation == {names[i] for i in validation}
    with pytest.raises(ValueError, match="too few"):
        split_indices(hashes[:1], "train", "x")


# ---- image folders


def test_image_folder_reads_every_image_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 21)
    everything = ImageFolder(folder, image_size=8, split="all")
    assert len(everything) == 21
    parts = [
        ImageFolder(folder, image_size=8, split=split).paths for split in ("train", "validation")
    ]
    assert sorted(parts[0] + parts[1]) == sorted(everything.paths)
    assert everything[0]["image"].shape == (3, 8, 8)
    assert everything[0]["image"].dtype == torch.uint8


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 4)
    first = ImageFolder(folder, image_size=8, split="all", crop="zoom")
    second = ImageFolder(folder, image_size=8, split="all", crop="zoom")
    second[3]  # reading in another order changes nothing
    assert torch.equal(first[0]["image"], second[0]["image"])
    before = first[0]["image"]
    first.set_epoch(1)
    assert not torch.equal(before, first[0]["image"])


def test_a_broken_image_is_replaced_by_the_next_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "images", 6)
    broken = folder / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    dataset = ImageFolder(folder, image_size=8, split="all")
    index = dataset.paths.index(broken)
    assert torch.equal(dataset[index]["image"], dataset[(index + 1) % 6]["image"])
    dataset[index]
    assert dataset.broken.found == {index}
    assert capsys.readouterr().err.count("000.png") == 1


def test_too_many_broken_images_stop_the_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 20)
    for path in sorted(folder.rglob("*.png"))[:8]:
        path.write_bytes(b"not an image")
    dataset = ImageFolder(folder, image_size=8, split="all")
    with pytest.raises(TooManyBrokenSamples, match="Repair or remove"):
        [dataset[i] for i in range(20)]


def test_all_images_broken(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(TooManyBrokenSamples, match="none of its 2"):
        ImageFolder(tmp_path, image_size=8, split="all")[0]


# ---- tars


def test_tar_pairs_equal_what_was_written_by_webdataset(tmp_path: Path) -> None:
    source = str(make_tar(tmp_path / "a.tar", 9))
    dataset = TarDataset(source, image_size=14, captions=True, split="all")
    assert [dataset[i]["caption"] for i in range(9)] == [f"caption {i}" for i in range(9)]
    expected = open_image(io.BytesIO(encoded(1))).crop((3, 0, 17, 14))  # sample 1 is a PNG: exact
    assert np.array_equal(dataset[1]["image"].permute(1, 2, 0).numpy(), np.array(expected))


def test_tar_globs_ranges_and_splits(tmp_path: Path) -> None:
    for i in range(3):
        make_tar(tmp_path / f"part-{i}.tar", 7)
    glob, braces = str(tmp_path / "part-*.tar"), str(tmp_path / "part-{0..2}.tar")
    assert len(open_pairs(glob, image_size=8, split="all")) == 21
    train, validation = (
        open_images(braces, image_size=8, split=split) for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (20, 1)
    with pytest.raises(FileNotFoundError, match=r"part-3\.tar"):
        open_pairs(str(tmp_path / "part-{0..3}.tar"), image_size=8)


def test_the_index_is_kept_and_made_anew_when_the_tar_changes(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", 3)
    first = np.array(tar_index(str(path)))
    cache = tmp_path / ".a.tar.index.npy"
    assert cache.exists()
    assert np.array_equal(tar_index(str(path)), first)
    cache.write_bytes(cache.read_bytes()[:40])
    assert np.array_equal(tar_index(str(path)), first)
    make_tar(path, 5)
    assert len(tar_index(str(path))) == 6


def test_processes_share_the_scanning_and_read_only_tars_are_indexed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    paths = [make_tar(folder / f"{i}.tar", 2 + i) for i in range(4)]
    scanned: list[str] = []
    scan, atomic_path = tars._scan_tar, tars.atomic_path

    def refuse(path: Path) -> object:
        if path.parent == folder or refuse_all:
            raise PermissionError("read-only")
        return atomic_path(path)

    monkeypatch.setattr(
        tars, "_scan_tar", lambda path: (scanned.append(Path(path).name), scan(path))[1]
    )
    monkeypatch.setattr(tars, "atomic_path", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_all = False
    names = [str(path) for path in paths]
    assert tars.tar_indices(names, lambda number, index: (number, len(index))) == [
        (0, 2),
        (1, 3),
        (2, 4),
        (3, 5),
    ]
    assert scanned == ["2.tar", "3.tar", "0.tar", "1.tar"], "rank 1 of 2 begins in the middle"
    tars.tar_indices(names, lambda number, index: None)
    assert len(scanned) == 4
    assert sorted(folder.iterdir()) == paths
    refuse_all = True
    assert len(tar_index(str(make_tar(folder / "4.tar", 3)))) == 4
    assert "not kept" in capsys.readouterr().err


def test_a_tar_cut_short_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", 5)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-3]
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size // 2])
    with pytest.raises(ValueError, match=r"a\.tar is damaged after \d samples .*fetch it again"):
        open_pairs(str(path), image_size=8)


def test_a_truncated_image_inside_a_tar_is_stepped_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(4):
            writer.write(
                {
                    "__key__": f"s{i}",
                    "png": encoded(i)[: 50 if i == 1 else None],
                    "txt": f"caption {i}",
                }
            )
    dataset = TarDataset(str(path), image_size=8, captions=True, split="all")
    assert [dataset[i]["caption"] for i in range(4)] == [
        "caption 0",
        "caption 2",
        "caption 2",
        "caption 3",
    ]
    assert "a.tar, s1.png: not a readable image" in capsys.readouterr().err


def test_tars_without_captions(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(3):
            writer.write({"__key__": f"s{i}", "png": encoded(i)})
    assert len(open_images(str(path), image_size=8, split="all")) == 3
    with pytest.raises(ValueError, match="no caption"):
        open_pairs(str(path), image_size=8)


# ---- caption files


def write_jsonl(folder: Path, lines: list[str]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_jsonl_pairs(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 4)
    lines = [
        json.dumps({"image": f"images/{'sub/' * (i % 2)}{i:03d}.png", "caption": f" caption {i} "})
        for i in range(4)
    ]
    dataset = open_pairs(write_jsonl(tmp_path, [*lines, ""]), image_size=8, split="all")
    assert [dataset[i]["caption"] for i in range(4)] == [f"caption {i}" for i in range(4)]


def test_jsonl_problems_are_found_when_it_is_opened(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 1)
    good = json.dumps({"image": "images/000.png", "caption": "x"})
    with pytest.raises(
        ValueError, match=r"(?s)3 of 4 entries cannot be used.*line 2.*line 3.*line 4"
    ):
        open_pairs(write_jsonl(tmp_path, [good, "{", '{"image": "a.png"}', "[1]"]), image_size=8)
    missing = [json.dumps({"image": f"images/no{i}.png", "caption": "x"}) for i in range(8)]
    with pytest.raises(
        FileNotFoundError, match=r"(?s)8 of 9 images do not exist.*no0\.png.*and 3 more"
    ):
        open_pairs(write_jsonl(tmp_path, [good, *missing]), image_size=8)


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    assert missing_files([tmp_path / "a", tmp_path / "b", tmp_path / "c" / "d"]) == [
        tmp_path / "b",
        tmp_path / "c" / "d",
    ]


# ---- conversations

TURNS = [
    {"from": "human", "value": f"What is this? {IMAGE_TAG}"},
    {"from": "gpt", "value": "An image."},
]


def write_json(folder: Path, records: object) -> str:
    path = folder / "chat.json"
    path.write_text(json.dumps(records))
    return str(path)


def test_llava_records(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 1)
    text_only = {
        "id": "t",
        "conversations": [
            {"from": "gpt", "value": "Hello"},
            *({**t, "value": "hm"} for t in TURNS),
        ],
    }
    records = [{"id": "p", "image": "000.png", "conversations": TURNS}, text_only]
    dataset = open_conversations(
        write_json(tmp_path, records), image_size=8, image_folder=tmp_path / "images"
    )
    assert dataset[0]["image"].size == (20, 14)
    assert dataset[0]["conversations"][0]["value"] == f"{IMAGE_TAG}\nWhat is this?"
    assert "image" not in dataset[1]
    assert [turn["from"] for turn in dataset[1]["conversations"]] == ["human", "gpt"]


@pytest.mark.parametrize(
    ("turns", "num_images", "message"),
    [
        (TURNS, 0, "has no image, but 1 <image> tag$"),
        ([{**turn, "value": "x"} for turn in TURNS], 1, "has 1 image, but 0 <image> tags"),
        ([*TURNS, *TURNS], 1, "has 1 image, but 2 <image> tags"),
        (TURNS, 2, "has 2 images, but 1 <image> tag"),
        (
            [{"from": "human", "value": "x"}, {"from": "gpt", "value": IMAGE_TAG}],
            1,
            "in an answer .turn 2",
        ),
        ([TURNS[0], TURNS[0]], 1, "take turns"),
        ([{"from": "system", "value": "x"}], 0, "must be human or gpt"),
        ([TURNS[0]], 1, "no question with an answer"),
        ("hello", 0, "must be a list"),
    ],
)
def test_turns_that_cannot_be_used(turns: object, num_images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_turns(turns, num_images=num_images)


def test_several_images_stay_in_their_turns(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    turns = [
        {"from": "human", "value": f"{IMAGE_TAG} or {IMAGE_TAG}?"},
        TURNS[1],
        TURNS[0],
        TURNS[1],
    ]
    record = {"id": "p", "image": ["000.png", "002.png", "sub/001.png"], "conversations": turns}
    [sample] = [open_conversations(write_json(tmp_path, [record]), image_size=8)[0]]
    assert [turn["value"].count(IMAGE_TAG) for turn in sample["conversations"]] == [2, 0, 1, 0]
    assert sample["conversations"][0]["value"] == f"{IMAGE_TAG}\n{IMAGE_TAG}\nor ?"
    assert [p.tobytes() for p in sample["image"]] == [make_image(i).tobytes() for i in (0, 2, 1)]


@pytest.mark.parametrize("as_text", [False, True])
def test_tables_of_conversations(
    as_text: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: Any = [TURNS, [{**turn, "value": "a word"} for turn in TURNS], [*TURNS, *TURNS], TURNS]
    stored = [{"bytes": encoded(i), "path": None} if i != 1 else None for i in range(4)]
    columns = {
        "id": ["a", "b", "c", "d"],
        "image": stored,
        "conversations": [json.dumps(t) for t in turns] if as_text else turns,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    dataset = open_conversations(f"hf:{tmp_path / '*.parquet'}", image_size=8)
    assert [dataset[i]["id"] for i in range(4)] == [
        "a",
        "b",
        "d",
        "d",
    ]  # row 2 shows one image twice: stepped over
    assert "row 2: has 1 image, but 2 <image> tags" in capsys.readouterr().err
    assert dataset[3]["image"].tobytes() == make_image(3).tobytes()
    assert "image" not in dataset[1]
    assert dataset.modality_lengths().tolist()[:2] == [6, -4]
    with pytest.raises(ValueError, match="trained on whole"):
        open_conversations(f"hf:{tmp_path / 'a.parquet'}", image_size=8, split="validation")
    assert "4 rows" in fingerprint(f"hf:{tmp_path / 'a.parquet'}")


# ---- grouped sampling


def test_grouped_batches_hold_one_modality_and_are_balanced() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 500, 1000) * np.where(rng.random(1000) < 0.3, -1, 1)
    sampler = GroupedSampler(lengths, micro_batch_size=4, micro_batches=8)
    order = np.array(list(sampler))
    assert sorted(order) == list(range(1000))
    steps = lengths[order[: 1000 // 32 * 32]].reshape(-1, 32)
    mixed = [step for step in steps if len(set(np.sign(step))) > 1]
    assert len(mixed) <= 1  # what is left over of both
    assert set(np.sign(steps[:, 0])) == {-1, 1}
    totals = np.abs(steps[:-2]).reshape(-1, 8, 4).sum(-1)
    assert np.median(totals.max(1) / totals.min(1)) < 1.2
    assert list(sampler) == list(order)
    sampler.set_epoch(1)
    assert list(sampler) != list(order)


def test_lengths_of_a_mixture_are_those_of_what_it_draws(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    words = [
        {"conversations": [{"from": "human", "value": "x " * n}, {"from": "gpt", "value": "y"}]}
        for n in (1, 5, 9)
    ]
    mixture = open_conversations(
        f"{write_json(tmp_path / 'text', words)}*0.5+scenes*0.5", image_size=64, size=20
    )
    lengths = mixture.modality_lengths()
    for index in range(20):
        record = mixture[index]
        expected = (
            1
            if "image" in record
            else -len(" ".join(t["value"] for t in record["conversations"]).split())
        )
        assert lengths[index] == expected


def test_llava_problems_are_found_when_it_is_opened(tmp_path: Path) -> None:
    bad = [{"id": f"r{i}", "conversations": TURNS} for i in range(7)]
    with pytest.raises(
        ValueError, match=r"(?s)7 of 7 entries.*record 0 \(r0\).*has no image.*and 2 more"
    ):
        open_conversations(write_json(tmp_path, bad), image_size=8)
    with pytest.raises(
        FileNotFoundError,
        match=r"(?s)1 of 1 records show 1 images .*set image_folder.*nowhere\.png",
    ):
        open_conversations(
            write_json(tmp_path, [{"image": "nowhere.png", "conversations": TURNS}]), image_size=8
        )
    with pytest.raises(
        ValueError, match=r"(?s)1 of 1 entries.*expected an object with the key conversations"
    ):
        open_conversations(write_json(tmp_path, {"a": 1}), image_size=8)
    with pytest.raises(
        ValueError, match="expected a JSON list of records, or one record a line, got none"
    ):
        open_conversations(write_json(tmp_path, []), image_size=8)
    (tmp_path / "chat.json").write_text("[{")
    with pytest.raises(ValueError, match="not valid JSON"):
        open_conversations(str(tmp_path / "chat.json"), image_size=8)


# ---- names of sources


def test_scenes_open_as_every_kind() -> None:
    image = open_images("scenes", image_size=32, size=3)[0]["image"]
    assert image.shape == (3, 32, 32)
    pair = open_pairs("scenes", image_size=32, size=3)[0]
    assert torch.equal(pair["image"], image)
    assert pair["caption"].startswith("a photo of")
    record = open_conversations("scenes", image_size=32, split="validation")[0]
    assert record["conversations"][0]["value"].startswith(IMAGE_TAG)
    assert len(open_images("scenes", image_size=32)) == 1_000_000


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("scenes:emojis", ValueError, "Did you mean 'emoji'"),
        ("no/such/folder", FileNotFoundError, "does not exist"),
        ("no/such.jsonl", FileNotFoundError, "does not exist"),
        ("no/such.tar", FileNotFoundError, "no such file"),
        (__file__, ValueError, "unknown kind"),
    ],
)
def test_source_names_that_cannot_be_opened(
    source: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_pairs(source, image_size=8)


def test_a_source_of_the_wrong_kind_says_what_to_give(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 2)
    with pytest.raises(ValueError, match="has no captions"):
        open_pairs(str(tmp_path / "images"), image_size=8)
    with pytest.raises(ValueError, match="holds no conversations"):
        open_conversations(str(tmp_path / "images"), image_size=8)
    assert source_kind(str(tmp_path / "images")) == "folder"


def test_fingerprints_name_content(tmp_path: Path) -> None:
    assert fingerprint("scenes") == fingerprint("scenes")
    folder = make_folder(tmp_path / "images", 2)
    before = fingerprint(str(folder))
    make_image(9, (30, 30)).save(folder / "000.png")
    assert fingerprint(str(folder)) != before
    assert "1 tars" in fingerprint(str(make_tar(tmp_path / "a.tar", 2)))
