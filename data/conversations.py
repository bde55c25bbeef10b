"""LLaVA's conversations: records {id, [image,] conversations: [{from, value}, …]}; `image` is one path or a list of them.

Everything that can be wrong with a record of a file is found when the file is opened: upstream trains on silently
(haotian-liu/LLaVA, `llava/train/train.py`, checks none of it), and a missing image stops a run after hours. A few unusable
records are left out by name, many end the run before it begins. Tables with the images inside (parquet) are too large for
that; there a bad row is stepped over, and `vqrae check-data` finds it.
"""

import codecs
import io
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqrae.common.files import parse_json, printable, raw_lines, read_json, with_retries
from vqrae.common.images import open_image
from vqrae.data.huggingface import open_table, parse_name, stored_bytes, without_decoding
from vqrae.data.samples import TolerantDataset, missing_files, step_over, summary
from vqrae.data.stream import Draw

IMAGE_TAG = "<image>"
_HALF_PAIR = re.compile("[\\ud800-\\udfff]")
_VIDEO = re.compile(
    r"^\s*<video>\s*$", re.MULTILINE
)  # on a line of its own: a talk about HTML has the tag, too


def normalize_turns(turns: Any, *, num_images: int) -> list[dict[str, str]]:
    """Turns in LLaVA's canonical form: human first, alternating, the image tags of a question at its head.

    A leading answer is dropped as upstream does, and so is a last question without an answer, which teaches nothing.

    Raises:
        ValueError: saying what is wrong with the turns.
    """
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns
    ):
        raise ValueError('conversations must be a list of {"from": …, "value": text}')
    speakers = [str(turn.get("from")) for turn in turns]
    if others := set(speakers) - {"human", "gpt"}:
        raise ValueError(f"speakers must be human or gpt, got {sorted(others)}")
    if any(a == b for a, b in pairwise(speakers)):
        raise ValueError("human and gpt must take turns")
    turns = turns[1:] if speakers[:1] == ["gpt"] else turns
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise ValueError("no question with an answer")
    if not num_images and any(_VIDEO.search(turn["value"]) for turn in turns):
        raise ValueError("is about a video, of which this model sees nothing")
    tags = [turn["value"].count(IMAGE_TAG) for turn in turns]
    if sum(tags) != num_images:
        plural = "s" * (num_images > 1)
        raise ValueError(
            f"has {num_images or 'no'} image{plural}, but {sum(tags)} {IMAGE_TAG} tag{'s' * (sum(tags) != 1)}"
        )
    if any(tags[1::2]):
        raise ValueError(
            f"{IMAGE_TAG} stands in an answer (turn {tags.index(max(tags[1::2])) + 1}), expected it in a question"
        )
    return [
        {
            "from": turn["from"],
            "value": f"{IMAGE_TAG}\n" * count + turn["value"].replace(IMAGE_TAG, "").strip(),
        }
        for turn, count in zip(turns, tags, strict=True)
    ]


def image_paths(record: dict[str, Any]) -> list[str]:
    """The images of a record of a LLaVA file, as it is stored.

    Raises:
        ValueError: when `image` is neither a path nor a list of paths.
    """
    image = record.get("image") or []
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"image must be one path or a list of paths, got {image!r}")
    return paths


def scan_conversations(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The usable records of a LLaVA file in canonical form, and what is wrong with each other one.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not hold records.
    """
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for i, stored in enumerate(stored_records(path)):
        try:
            records.append(check_record(stored, i))
        except ValueError as error:
            name = stored.get("id", "no id") if isinstance(stored, dict) else type(stored).__name__
            problems.append(
                f"record {i} ({'line' if isinstance(stored, bytes) else name}): {error}"
            )
    return records, problems


def stored_records(path: str | Path) -> list[Any]:
    """The records of a LLaVA file as they are stored: those of a JSON list, or lines (bytes) where each holds one record.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as stream:
        is_list = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    found = read_json(path) if is_list else [line for _, line in raw_lines(path) if line.strip()]
    if not found:
        raise ValueError(f"{path}: expected a JSON list of records, or one record a line, got none")
    return found


def has_record_lines(path: str | Path) -> bool:
    """Whether a file of JSON lines holds conversations, judged by its first line."""
    if not Path(path).is_file():
        return False
    first = next((line for _, line in raw_lines(path) if line.strip()), b"")
    return b'"conversations"' in first


def read_conversations(
    path: str | Path, image_folder: str | Path | None = None, *, skip_missing: int = 0
) -> list[dict[str, Any]]:
    """All records of a LLaVA file, checked and in canonical form; `image` stays a path relative to `image_folder`.

    Args:
        image_folder: where the images lie; the file's own folder when not given.
        skip_missing: so many records may lack an image; they are left out, with a message.

    Raises:
        FileNotFoundError: when the file or images are missing, with their number and the first few.
        ValueError: when too many records cannot be used, see `step_over`.
    """
    path = Path(path)
    records, problems = scan_conversations(path)
    step_over(path, problems, len(records) + len(problems))
    folder = Path(image_folder or path.parent)
    missing = missing_files(folder / image for record in records for image in image_paths(record))
    if missing:
        gone = set(missing)
        kept = [
            record
            for record in records
            if not any(folder / image in gone for image in image_paths(record))
        ]
        lost = len(records) - len(kept)
        told = f"{path}: {lost} of {len(records)} records show {len(missing)} images that do not exist below {folder}"
        names = summary([str(file) for file in missing])
        if lost > skip_missing or not kept:
            raise FileNotFoundError(
                f"{told}; fetch them, set image_folder, set skip_missing={lost} to leave these records out, or let "
                f"`vqrae check-data {path} --write-clean NEW` write the others{names}"
            )
        print(printable(f"{told}, left out{names}"), file=sys.stderr, flush=True)
        records = kept
    if blank := sum(has_blank_answer(record) for record in records):
        told = f"{path}: {blank} of {len(records)} records have a blank answer, which teaches to say nothing"
        print(told, file=sys.stderr, flush=True)
    return records


def has_blank_answer(record: dict[str, Any]) -> bool:
    """Whether there is nothing in an answer of a canonical record."""
    return any(turn["from"] == "gpt" and not turn["value"] for turn in record["conversations"])


def check_record(stored: Any, index: int) -> dict[str, Any]:
    """A record (a line of JSON, or its value) in canonical form.

    Raises:
        ValueError: saying why it cannot be used.
    """
    record = parse_json(stored, "line") if isinstance(stored, bytes) else stored
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError("expected an object with the key conversations")
    if media := [key for key in ("video", "videos", "audio") if record.get(key)]:
        raise ValueError(f"has a {media[0]}, of which this model perceives nothing")
    name, paths = str(record.get("id", index)), image_paths(record)
    turns = normalize_turns(record["conversations"], num_images=len(paths))
    if any(_HALF_PAIR.search(text) for text in (name, *paths, *(turn["value"] for turn in turns))):
        raise ValueError("holds half of a surrogate pair, which is no text")
    return {"id": name, **({"image": record["image"]} if paths else {}), "conversations": turns}


def modality_length(turns: list[dict[str, str]]) -> int:
    """Words of all turns, negative when they show no image: what LLaVA's grouped sampling sorts by."""
    words = max(1, sum(len(turn["value"].split()) for turn in turns))
    return words if any(IMAGE_TAG in turn["value"] for turn in turns) else -words


class Conversations(TolerantDataset):
    """Records of a LLaVA file -> {"id", ["image": RGB image or a list of them,] "conversations"}."""

    def __init__(
        self,
        path: str | Path,
        *,
        image_folder: str | Path | None = None,
        size: int | None = None,
        skip_missing: int = 0,
    ) -> None:
        super().__init__(str(path))
        self.folder = Path(image_folder or Path(path).parent)
        self.records = read_conversations(path, image_folder, skip_missing=skip_missing)[:size]

    def __len__(self) -> int:
        return len(self.records)

    def texts(self, index: int) -> list[str]:
        """What is said in a record, without its images."""
        turns = self.records[index]["conversations"]
        return [turn["value"].replace(IMAGE_TAG, "") for turn in turns]

    def read(self, draw: Draw) -> dict[str, Any]:
        record = dict(self.records[draw])
        if "image" in record:
            images = [open_image(self.folder / path) for path in image_paths(record)]
            record["image"] = images[0] if len(images) == 1 else images
        return record

    def modality_lengths(self) -> np.ndarray:
        """`modality_length` of every record, int64 (records,)."""
        return np.array([modality_length(record["conversations"]) for record in self.records])


class ConversationTable(TolerantDataset):
    """Rows of a Hugging Face data set or of parquet files, with LLaVA's columns -> the samples of `Conversations`.

    `conversations` holds LLaVA's turns as a list or as JSON text; `image` (or `images`, or the column that
    `,image=COLUMN` names) one image, a list of images, or nothing.
    """

    def __init__(self, source: str, *, size: int | None = None) -> None:
        super().__init__(source)
        table = open_table(source)
        if "conversations" not in table.features:
            raise ValueError(
                f"{source} has no column conversations, only {', '.join(table.features)}"
            )
        named = parse_name(source)[1].get("image")
        if named and named not in table.features:
            raise ValueError(f"{source} has no column {named!r}, only {', '.join(table.features)}")
        self.image_column = named or next(
            (name for name in ("image", "images") if name in table.features), None
        )
        if self.image_column:
            table = without_decoding(table, self.image_column)
        self.table, self.size = table, min(size or len(table), len(table))

    def __len__(self) -> int:
        return self.size

    def texts(self, index: int) -> list[str]:
        """What is said in a row, without its images; nothing when `read` will refuse it."""
        stored = self.table.select_columns(["conversations"])[index]["conversations"]
        try:
            return [turn["value"].replace(IMAGE_TAG, "") for turn in _turns(stored)]
        except (ValueError, TypeError, KeyError):
            return []

    def read(self, draw: Draw) -> dict[str, Any]:
        name = f"{self.source}, row {draw:d}"
        row = with_retries(lambda: self.table[int(draw)], name)
        stored = (row[self.image_column] if self.image_column else None) or []
        try:
            turns = _turns(row["conversations"])
            images = [
                _open(value, name) for value in (stored if isinstance(stored, list) else [stored])
            ]
            turns = normalize_turns(turns, num_images=len(images))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        image = {"image": images[0] if len(images) == 1 else images} if images else {}
        return {"id": str(row.get("id") or int(draw)), **image, "conversations": turns}

    def modality_lengths(self) -> np.ndarray:
        """`modality_length` of every row, int64 (rows,); no image is read."""
        return np.array(
            [_usable_length(value) for value in self.table["conversations"][: self.size]]
        )


def _usable_length(value: Any) -> int:
    """Length of stored turns; 1 for what `read` will refuse anyway."""
    try:
        return modality_length(_turns(value))
    except (ValueError, TypeError, KeyError, AttributeError):
        return 1


def _turns(value: Any) -> Any:
    return parse_json(value, "conversations") if isinstance(value, str) else value


def _open(value: Any, name: str) -> Image.Image:
    return open_image(io.BytesIO(stored_bytes(value, name)), name=name)
