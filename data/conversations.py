"""LLaVA's conversations: records {id, [image,] conversations: [{from, value}, …]}; `image` is one path or a list of them.

Everything that can be wrong with a record of a JSON file is found when the file is opened: upstream trains on silently
(haotian-liu/LLaVA, `llava/train/train.py`, checks none of it), and a missing picture stops a run after hours. Tables with
the pictures inside (parquet) are too large for that; there a bad row is stepped over, and `vqrae check-data` finds it.
"""

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqrae.common.files import read_json
from vqrae.common.pictures import open_picture
from vqrae.data.huggingface import open_table, parse_name, stored_bytes, without_decoding
from vqrae.data.stream import Draw
from vqrae.data.tolerant import TolerantDataset, missing_files, summary

IMAGE_TAG = "<image>"


def normalize_turns(turns: Any, *, num_images: int) -> list[dict[str, str]]:
    """Turns in LLaVA's canonical form: human first, alternating, the image tags of a question at its head.

    A leading answer is dropped as upstream does, and so is a last question without an answer, which teaches nothing.

    Raises:
        ValueError: saying what is wrong with the turns.
    """
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise ValueError('conversations must be a list of {"from": …, "value": text}')
    speakers = [turn.get("from") for turn in turns]
    if set(speakers) - {"human", "gpt"}:
        raise ValueError(f"speakers must be human or gpt, got {sorted(map(str, set(speakers) - {'human', 'gpt'}))}")
    if any(a == b for a, b in pairwise(speakers)):
        raise ValueError("human and gpt must take turns")
    turns = turns[1:] if speakers[:1] == ["gpt"] else turns
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise ValueError("no question with an answer")
    tags = [turn["value"].count(IMAGE_TAG) for turn in turns]
    if sum(tags) != num_images:
        plural = "s" * (num_images > 1)
        raise ValueError(f"has {num_images or 'no'} image{plural}, but {sum(tags)} {IMAGE_TAG} tag{'s' * (sum(tags) != 1)}")
    if any(tags[1::2]):
        raise ValueError(f"{IMAGE_TAG} stands in an answer (turn {tags.index(max(tags[1::2])) + 1}), expected it in a question")
    return [
        {"from": turn["from"], "value": f"{IMAGE_TAG}\n" * count + turn["value"].replace(IMAGE_TAG, "").strip()}
        for turn, count in zip(turns, tags, strict=True)
    ]


def image_paths(record: dict[str, Any]) -> list[str]:
    """The pictures of a record of a LLaVA file."""
    image = record.get("image") or []
    return [image] if isinstance(image, str) else image


def scan_conversations(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The usable records of a LLaVA file in canonical form, and what is wrong with each other one.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not hold a JSON list.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    raw = read_json(path)
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{path}: expected a JSON list of records, got {'an empty list' if raw == [] else type(raw).__name__}")
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for i, record in enumerate(raw):
        try:
            records.append(_check_record(record, i))
        except ValueError as error:
            name = record.get("id", "no id") if isinstance(record, dict) else type(record).__name__
            problems.append(f"record {i} ({name}): {error}")
    return records, problems


def read_conversations(path: str | Path, image_folder: str | Path | None = None) -> list[dict[str, Any]]:
    """All records of a LLaVA file, checked and in canonical form; `image` stays a path relative to `image_folder`.

    Args:
        image_folder: where the pictures lie; the file's own folder when not given.

    Raises:
        FileNotFoundError: when the file or pictures are missing, with their number and the first few.
        ValueError: listing the first records that cannot be used.
    """
    path = Path(path)
    records, problems = scan_conversations(path)
    if problems:
        total = len(records) + len(problems)
        raise ValueError(f"{path}: {len(problems)} of {total} records cannot be used; mend or remove them{summary(problems)}")
    folder = Path(image_folder or path.parent)
    missing = missing_files(folder / image for record in records for image in image_paths(record))
    if missing:
        with_image = sum("image" in record for record in records)
        raise FileNotFoundError(
            f"{path}: {len(missing)} pictures of its {with_image} records with a picture do not exist below {folder}; "
            f"set image_folder, or fetch them{summary([str(file) for file in missing])}"
        )
    return records


def _check_record(record: Any, index: int) -> dict[str, Any]:
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError("expected an object with the key conversations")
    image = record.get("image")
    if not isinstance(image, str | list | None) or not all(isinstance(path, str) for path in image_paths(record)):
        raise ValueError(f"image must be one path or a list of paths, got {image!r}")
    checked = {"id": str(record.get("id", index))} | ({"image": image} if image else {})
    return {**checked, "conversations": normalize_turns(record["conversations"], num_images=len(image_paths(record)))}


def modality_length(turns: list[dict[str, str]]) -> int:
    """Words of all turns, negative when they show no picture: what LLaVA's grouped sampling sorts by."""
    words = max(1, sum(len(turn["value"].split()) for turn in turns))
    return words if any(IMAGE_TAG in turn["value"] for turn in turns) else -words


class Conversations(TolerantDataset):
    """Records of a LLaVA file -> {"id", ["image": RGB picture or a list of them,] "conversations"}."""

    def __init__(self, path: str | Path, *, image_folder: str | Path | None = None, size: int | None = None) -> None:
        super().__init__(str(path))
        self.folder = Path(image_folder or Path(path).parent)
        self.records = read_conversations(path, image_folder)[:size]

    def __len__(self) -> int:
        return len(self.records)

    def texts(self, index: int) -> list[str]:
        """What is said in a record, without its pictures."""
        return [turn["value"] for turn in self.records[index]["conversations"]]

    def read(self, draw: Draw) -> dict[str, Any]:
        record = dict(self.records[draw])
        if "image" in record:
            pictures = [open_picture(self.folder / path) for path in image_paths(record)]
            record["image"] = pictures[0] if len(pictures) == 1 else pictures
        return record

    def modality_lengths(self) -> np.ndarray:
        """`modality_length` of every record, int64 (records,)."""
        return np.array([modality_length(record["conversations"]) for record in self.records])


class ConversationTable(TolerantDataset):
    """Rows of a Hugging Face data set or of parquet files, with LLaVA's columns -> the samples of `Conversations`.

    `conversations` holds LLaVA's turns as a list or as JSON text; `image` (or `images`, or the column that
    `,image=COLUMN` names) one picture, a list of pictures, or nothing.
    """

    def __init__(self, source: str, *, size: int | None = None) -> None:
        super().__init__(source)
        table = open_table(source)
        if "conversations" not in table.features:
            raise ValueError(f"{source} has no column conversations, only {', '.join(table.features)}")
        named = parse_name(source)[1].get("image")
        if named and named not in table.features:
            raise ValueError(f"{source} has no column {named!r}, only {', '.join(table.features)}")
        self.image_column = named or next((name for name in ("image", "images") if name in table.features), None)
        if self.image_column:
            table = without_decoding(table, self.image_column)
        self.table, self.size = table, min(size or len(table), len(table))

    def __len__(self) -> int:
        return self.size

    def texts(self, index: int) -> list[str]:
        """What is said in a row, without its pictures; nothing when `read` will refuse it."""
        try:
            return [turn["value"] for turn in _turns(self.table.select_columns(["conversations"])[index]["conversations"])]
        except (ValueError, TypeError, KeyError):
            return []

    def read(self, draw: Draw) -> dict[str, Any]:
        name, row = f"{self.source}, row {draw:d}", self.table[int(draw)]
        stored = (row[self.image_column] if self.image_column else None) or []
        try:
            turns = _turns(row["conversations"])
            pictures = [_open(value, name) for value in (stored if isinstance(stored, list) else [stored])]
            turns = normalize_turns(turns, num_images=len(pictures))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        image = {"image": pictures[0] if len(pictures) == 1 else pictures} if pictures else {}
        return {"id": str(row.get("id") or int(draw)), **image, "conversations": turns}

    def modality_lengths(self) -> np.ndarray:
        """`modality_length` of every row, int64 (rows,); no picture is read."""
        return np.array([_usable_length(value) for value in self.table["conversations"][: self.size]])


def _usable_length(value: Any) -> int:
    """Length of stored turns; 1 for what `read` will refuse anyway."""
    try:
        return modality_length(_turns(value))
    except (ValueError, TypeError, KeyError, AttributeError):
        return 1


def _turns(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _open(value: Any, name: str) -> Image.Image:
    return open_picture(io.BytesIO(stored_bytes(value, name)), name=name)
