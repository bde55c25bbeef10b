"""What people's folders and lists hold: links, pipes, odd names, records that cannot be used. Named, never fatal."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vqrae.common.images import open_image
from vqrae.data import image_files as images
from vqrae.data.checks import check_source
from vqrae.data.image_files import ImageFolder, list_images
from vqrae.data.samples import TooManyBrokenSamples
from vqrae.data.sources import fingerprint, open_conversations, open_images, open_pairs, source_kind
from vqrae.scripts.cli import main

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def save(path: Path, size: tuple[int, int] = (20, 14), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    ).save(path)
    return path


# ---- folders


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("elsewhere/a/0.png", "elsewhere/a/deep/1.png", "data/own/2.png"):
        save(tmp_path / name)
    links = {
        "data/a": "elsewhere/a",
        "data/again": "elsewhere/a",
        "data/alias": "data/own",
        "data/own/loop": "data",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    found = [
        path.relative_to(tmp_path / "data").as_posix() for path in list_images(tmp_path / "data")
    ]
    assert found == ["a/0.png", "a/deep/1.png", "own/2.png"]


def test_a_folder_with_pipes_dead_links_and_names_in_latin_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.png", seed=i)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    save(tmp_path / os.fsdecode(b"caf\xe9.png"))
    (tmp_path / "escape\x1b[31m.png").write_bytes(b"")
    (tmp_path / "phone.heic").write_bytes(b"")
    dataset = ImageFolder(tmp_path, image_size=8, split="all")
    assert len([dataset[i] for i in range(len(dataset))]) == 8
    assert len(dataset.broken.found) == 3
    told = capsys.readouterr().err
    assert "pipe.png: cannot be read (not a regular file)" in told
    assert "dead.png: no such file" in told
    assert "escape\\x1b[31m.png" in told
    assert "left out what cannot be read here: 1 .heic" in told
    assert fingerprint(str(tmp_path)).startswith(f"{tmp_path}: 8 images")
    assert main(["check-data", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "3 broken images" in output
    assert "\x1b" not in output


def test_folders_that_cannot_be_listed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a" / "0.png")
    walk = os.walk

    def refuse(top: str, onerror: object) -> object:
        onerror(PermissionError(13, "Permission denied", f"{top}/locked"))
        return walk(top)

    monkeypatch.setattr(images.os, "walk", refuse)
    assert len(list_images(tmp_path)) == 1
    assert "locked is left out: Permission denied" in capsys.readouterr().err


# ---- filters and draft decoding


def test_filters_leave_small_and_long_images_out_without_counting_them_as_broken(
    tmp_path: Path,
) -> None:
    sizes = [(40, 40), (20, 40), (40, 100), *[(10, 10)] * 20, (60, 50)]
    for i, size in enumerate(sizes):
        save(tmp_path / f"{i:02d}.png", size, seed=i)
    dataset = open_images(str(tmp_path), image_size=8, split="all", min_edge=30, max_aspect=2)
    shown = [dataset[i]["image"].tolist() for i in range(len(sizes))]
    whole = open_images(str(tmp_path), image_size=8, split="all")
    kept = [0, *[23] * 23]
    assert shown == [whole[i]["image"].tolist() for i in kept]
    assert (dataset.broken.found, len(dataset.unwanted)) == (set(), 22)
    with pytest.raises(TooManyBrokenSamples, match="24 are left out by the filters"):
        open_images(str(tmp_path), image_size=8, split="all", min_edge=200)[0]


@pytest.mark.parametrize("crop", ["center", "random", "zoom"])
def test_draft_decoding_shows_the_same_image(tmp_path: Path, crop: str) -> None:
    ramp = np.linspace(0, 255, 600, dtype=np.uint8)
    pixels = np.stack(
        [
            np.tile(ramp, (500, 1)),
            np.full((500, 600), 90, np.uint8),
            np.full((500, 600), 40, np.uint8),
        ],
        axis=-1,
    )
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=95)
    whole, draft = (
        open_images(str(tmp_path), image_size=64, split="all", crop=crop, draft=d)
        for d in (False, True)
    )
    difference = (whole[0]["image"].float() - draft[0]["image"].float()).abs()
    assert difference.mean() < 2
    assert draft.draft == (80 if crop == "zoom" else 64)  # a zoom keeps 80 % of the edge
    assert min(open_image(tmp_path / "0.jpg", draft=draft.draft).size) == 125


# ---- lists


def write_lines(path: Path, lines: list[bytes]) -> str:
    path.write_bytes(b"\n".join(lines))
    return str(path)


ODD_LINES = [
    b"[" * 100_000,
    b'{"image": 5, "caption": "x"}',
    b'{"image": "0.png", "caption": "\\ud800"}',
    b'{"image": "0.png", "caption": "caf\xe9"}',
    b'{"image": "0.png"}',
    b"null",
]


def test_captions_of_every_odd_kind_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "0.png")
    good = json.dumps({"image": "0.png", "caption": "a \u2028 line"}, ensure_ascii=False).encode()
    source = write_lines(tmp_path / "pairs.jsonl", [*[good] * 114, *ODD_LINES])
    pairs = open_pairs(source, image_size=8, split="all")
    assert (len(pairs), pairs[0]["caption"]) == (114, "a \u2028 line")
    assert "6 of 120 entries cannot be used and are left out" in capsys.readouterr().err
    with pytest.raises(
        ValueError,
        match=r"(?s)6 of 119 entries.*--write-clean.*line 114: JSON that is nested too deeply",
    ):
        open_pairs(write_lines(tmp_path / "pairs.jsonl", [*[good] * 113, *ODD_LINES]), image_size=8)


def odd_records(image: str) -> list[dict]:
    return [
        {"id": "number", "image": 5, "conversations": TURNS},
        {
            "id": "half",
            "image": image,
            "conversations": [{**TURNS[0], "value": "<image> \ud83d"}, TURNS[1]],
        },
        {
            "id": "video",
            "video": "v.mp4",
            "conversations": [{**TURNS[0], "value": "<video>\nwhat?"}, TURNS[1]],
        },
        {"id": "tag", "conversations": [{**TURNS[0], "value": "<video>\nwhat?"}, TURNS[1]]},
        {
            "id": ["\x1b[31m"],
            "image": image,
            "conversations": [{**TURNS[0], "from": ["human"]}, TURNS[1]],
        },
        {"id": "none", "conversations": None},
    ]


@pytest.mark.parametrize("form", ["list.json", "lines.json", "lines.jsonl"])
def test_records_of_every_odd_kind_are_left_out_by_name(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "0.png")
    html = {
        "id": "html",
        "conversations": [{"from": "human", "value": "what is <video> in HTML?"}, TURNS[1]],
    }
    records = [
        html,
        *[{"id": str(i), "image": "0.png", "conversations": TURNS} for i in range(120)],
        *odd_records("0.png"),
    ]
    texts = [json.dumps(record) for record in records]
    body = f"[{', '.join(texts)}]" if form == "list.json" else "\n".join(texts)
    (tmp_path / form).write_text(f"\ufeff{body}", encoding="utf-8")
    source = str(tmp_path / form)
    assert source_kind(source) == "json"
    dataset = open_conversations(source, image_size=8)
    assert len(dataset) == 121
    told = capsys.readouterr().err
    assert "6 of 127 entries cannot be used and are left out" in told
    assert "has a video, which this model cannot perceive" in told
    assert main(["check-data", source]) == 1
    assert "6 unusable records" in capsys.readouterr().out


def test_missing_images_of_a_list_are_skipped_up_to_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "0.png")
    records = [
        {"id": str(i), "image": "0.png" if i % 2 else f"no{i}.png", "conversations": TURNS}
        for i in range(10)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    with pytest.raises(
        FileNotFoundError,
        match=r"5 of 10 records show 5 images that do not exist.*set skip_missing=5",
    ):
        open_conversations(str(tmp_path / "chat.json"), image_size=8, skip_missing=4)
    dataset = open_conversations(str(tmp_path / "chat.json"), image_size=8, skip_missing=5)
    assert [record["id"] for record in dataset.records] == ["1", "3", "5", "7", "9"]
    assert "5 of 10 records show 5 images that do not exist" in capsys.readouterr().err


def test_blank_answers_are_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["red", "", "  \n"]
    records = [
        {"id": a, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": a}]}
        for a in answers
    ]
    records.append(
        {
            "id": "0",
            "conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": "x"}],
        }
    )
    (tmp_path / "chat.json").write_text(json.dumps(records))
    report = check_source(str(tmp_path / "chat.json"))
    assert [finding.count for finding in report.problems.values()] == [2]
    assert [finding.count for finding in report.notes.values()] == [1]
    open_conversations(str(tmp_path / "chat.json"), image_size=8)
    assert "2 of 4 records have a blank answer" in capsys.readouterr().err


def test_the_clean_list_holds_what_is_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "0.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    os.mkfifo(tmp_path / "pipe.png")
    good = {"id": "good", "image": "0.png", "source": "kept", "conversations": TURNS}
    bad = [{**good, "image": image} for image in ("cut.png", "no.png", "pipe.png")]
    blank = {**good, "conversations": [TURNS[0], {**TURNS[1], "value": " "}]}
    (tmp_path / "chat.json").write_text(
        json.dumps([good, *bad, blank, *odd_records("0.png"), good])
    )
    assert (
        main(
            [
                "check-data",
                str(tmp_path / "chat.json"),
                "--write-clean",
                str(tmp_path / "clean.json"),
            ]
        )
        == 0
    )
    assert "clean.json: 2 of 12 entries" in capsys.readouterr().out
    assert json.loads((tmp_path / "clean.json").read_text()) == [good, good]
    assert main(["check-data", str(tmp_path / "clean.json")]) == 0

    lines = [
        json.dumps({"image": image, "caption": "x"}).encode()
        for image in ("0.png", "cut.png", "no.png", "pipe.png")
    ]
    empty = b'{"image": "0.png", "caption": " "}'
    source = write_lines(tmp_path / "pairs.jsonl", [*lines, *ODD_LINES, empty])
    assert main(["check-data", source, "--write-clean", str(tmp_path / "clean.jsonl")]) == 0
    assert (tmp_path / "clean.jsonl").read_bytes() == lines[0] + b"\n"
    for target in ("pairs.jsonl", "clean.json", "sub/clean.jsonl"):
        assert main(["check-data", source, "--write-clean", str(tmp_path / target)]) == 2


# ---- tars


def test_captions_in_tars_of_every_odd_kind(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (9, 9)).save(stream, "PNG")
    odd = {
        "bom": b"\xef\xbb\xbfa cat",
        "deep": b"[" * 100_000,
        "latin": b"caf\xe9",
        "half": b'{"caption": "\\ud800"}',
    }
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for key, text in odd.items():
            suffix = "json" if text[:1] in b"[{" else "txt"
            writer.write({"__key__": key, "png": stream.getvalue(), suffix: text})
        writer.write(
            {
                "__key__": "list",
                "png": stream.getvalue(),
                "json": b'\xef\xbb\xbf{"caption": "a dog"}',
            }
        )
    pairs = open_pairs(str(tmp_path / "a.tar"), image_size=8, split="all")
    assert [pairs[i]["caption"] for i in range(5)] == ["a cat", "a dog", "a dog", "a dog", "a dog"]
    assert len(pairs.broken.found) == 3
