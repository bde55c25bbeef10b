"""LLaVA's records in files: canonical form; what cannot be used is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqrae.data.conversations import IMAGE_TAG, normalize_turns
from vqrae.data.sources import open_conversations, source_kind, texts_of

Capture = pytest.CaptureFixture[str]

TURNS = [
    {"from": "human", "value": f"What is this? {IMAGE_TAG}"},
    {"from": "gpt", "value": "An image."},
]
PLAIN = [{**turn, "value": "a word"} for turn in TURNS]


@pytest.fixture
def folder(png: Callable[..., bytes], tmp_path: Path) -> Path:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i, (20, 14)))
    return tmp_path


def write(folder: Path, records: object) -> str:
    (folder / "chat.json").write_text(json.dumps(records))
    return str(folder / "chat.json")


@pytest.mark.parametrize(
    ("turns", "num_images", "message"),
    [
        (TURNS, 0, "has no image, but 1 <image> tag$"),
        (PLAIN, 1, "has 1 image, but 0 <image> tags"),
        ([*TURNS, *TURNS], 1, "has 1 image, but 2 <image> tags"),
        (TURNS, 2, "has 2 images, but 1 <image> tag"),
        ([PLAIN[0], {"from": "gpt", "value": IMAGE_TAG}], 1, "in an answer .turn 2"),
        ([TURNS[0], TURNS[0]], 1, "take turns"),
        ([{"from": "system", "value": "x"}], 0, "must be human or gpt"),
        ([TURNS[0]], 1, "no question with an answer"),
        ("hello", 0, "must be a list"),
    ],
)
def test_turns_that_cannot_be_used(turns: object, num_images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_turns(turns, num_images=num_images)


def test_records_in_canonical_form(folder: Path) -> None:
    text_only = {"conversations": [{"from": "gpt", "value": "Hello"}, *PLAIN, PLAIN[0]]}
    question = {"from": "human", "value": f"{IMAGE_TAG} or {IMAGE_TAG}?"}
    several = {"image": ["0.png", "2.png", "1.png"]}
    several["conversations"] = [question, TURNS[1], *TURNS]
    records = [{"id": "p", "image": "0.png", "conversations": TURNS}, text_only, several]
    source = write(folder, records)
    dataset = open_conversations(source, image_size=8)
    assert dataset[0]["image"].size == (20, 14)
    assert dataset[0]["conversations"][0]["value"] == f"{IMAGE_TAG}\nWhat is this?"
    assert "image" not in dataset[1]
    assert [turn["from"] for turn in dataset[1]["conversations"]] == ["human", "gpt"]
    said = [turn["value"] for turn in dataset[2]["conversations"]]
    assert [text.count(IMAGE_TAG) for text in said] == [2, 0, 1, 0]
    assert said[0] == f"{IMAGE_TAG}\n{IMAGE_TAG}\nor ?"
    assert [image.getpixel((0, 0))[0] for image in dataset[2]["image"]] == [0, 2, 1]
    assert texts_of(dataset)[:2] == ["\nWhat is this?", "An image."]
    with pytest.raises(ValueError, match="without validation"):
        open_conversations(source, image_size=8, split="validation")
    with pytest.raises(ValueError, match="holds no conversations"):
        open_conversations(str(folder), image_size=8)


def odd_records(image: str) -> list[dict[str, Any]]:
    """Records that cannot be used, each for another reason."""
    video = [{"from": "human", "value": "<video>\nwhat?"}, TURNS[1]]
    half = [{**TURNS[0], "value": f"{IMAGE_TAG} \ud83d"}, TURNS[1]]
    speaker = [{**TURNS[0], "from": ["human"]}, TURNS[1]]
    return [
        {"id": "number", "image": 5, "conversations": TURNS},
        {"id": "half", "image": image, "conversations": half},
        {"id": "video", "video": "v.mp4", "conversations": video},
        {"id": ["\x1b[31m"], "image": image, "conversations": speaker},
        {"id": "none", "conversations": None},
    ]


@pytest.mark.parametrize("form", ["list.json", "lines.json", "lines.jsonl"])
def test_odd_records_are_left_out_by_name(form: str, folder: Path, capsys: Capture) -> None:
    good = [{"id": str(i), "image": "0.png", "conversations": TURNS} for i in range(120)]
    records = [*good, *odd_records("0.png")]
    texts = [json.dumps(record) for record in records]
    body = f"[{', '.join(texts)}]" if form == "list.json" else "\n".join(texts)
    (folder / form).write_text(f"\ufeff{body}", encoding="utf-8")
    assert source_kind(str(folder / form)) == "json"
    assert len(open_conversations(str(folder / form), image_size=8)) == 120
    told = capsys.readouterr().err
    assert "5 of 125 entries cannot be used and are left out" in told
    assert "has a video" in told


def test_missing_images_are_skipped_up_to_a_number(folder: Path, capsys: Capture) -> None:
    names = ["0.png" if i % 2 else f"no{i}.png" for i in range(10)]
    records = [{"id": n, "image": n, "conversations": TURNS} for n in names]
    source = write(folder, records)
    message = r"5 of 10 records show 5 images that do not exist.*set skip_missing=5"
    with pytest.raises(FileNotFoundError, match=message):
        open_conversations(source, image_size=8, skip_missing=4)
    dataset = open_conversations(source, image_size=8, skip_missing=5)
    assert [record["id"] for record in dataset.records] == ["0.png"] * 5
    assert "5 of 10 records show 5 images that do not exist" in capsys.readouterr().err
    (folder / "elsewhere").mkdir()
    for name in names:
        (folder / "elsewhere" / name).write_bytes((folder / "0.png").read_bytes())
    options = {"image_size": 8, "image_folder": folder / "elsewhere"}
    assert len(open_conversations(source, **options)) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "expected an object with the key conversations"),
        ([], "expected a JSON list of records, or one record a line, got none"),
        ([{"id": "r0", "conversations": TURNS}] * 7, r"7 of 7 entries.*\(r0\).*and 2 more"),
        ("[{", "not valid JSON"),
    ],
)
def test_files_that_cannot_be_used(content: object, message: str, tmp_path: Path) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        open_conversations(str(tmp_path / "chat.json"), image_size=8)
