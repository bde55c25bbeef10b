"""LLaVA's conversations: records {id, [image,] conversations: [{from, value}, …]}.

`image` is one path or a list of them. Everything that can be wrong with a record of a file is found
when the file is opened: haotian-liu/LLaVA checks nothing (`llava/train/train.py`) and trains on it,
and a missing image stops its run after hours.
"""

import codecs
import json
import sys
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.files import parse_json, printable, raw_lines, read_json
from vqrae.common.images import open_image
from vqrae.data.image_files import file_fingerprint
from vqrae.data.samples import TolerantDataset, leave_out, missing_files, summary
from vqrae.data.stream import Draw

IMAGE_TAG = "<image>"


# ---- records


def normalize_turns(turns: Any, *, num_images: int) -> list[dict[str, str]]:
    """Turns in LLaVA's form: human first, alternating, image tags at the head of a question.

    A leading answer is dropped as in LLaVA, and so is a last question without an answer, from which
    nothing can be learned.

    Raises ValueError, saying what is wrong with the turns.
    """
    is_text = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    if not is_text or not all(isinstance(turn.get("value"), str) for turn in turns):
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
    tags = [turn["value"].count(IMAGE_TAG) for turn in turns]
    _check_tags(tags, num_images)
    normalized = []
    for turn, count in zip(turns, tags, strict=True):
        text = turn["value"].replace(IMAGE_TAG, "").strip()
        normalized.append({"from": turn["from"], "value": f"{IMAGE_TAG}\n" * count + text})
    return normalized


def _check_tags(tags: list[int], num_images: int) -> None:
    """Whether the number of image tags in each turn fits the images of a record."""
    if sum(tags) != num_images:
        images = f"{num_images or 'no'} image{'s' * (num_images > 1)}"
        raise ValueError(f"has {images}, but {sum(tags)} {IMAGE_TAG} tag{'s' * (sum(tags) != 1)}")
    if any(tags[1::2]):
        turn = tags.index(max(tags[1::2])) + 1
        raise ValueError(f"{IMAGE_TAG} is in an answer (turn {turn}), expected it in a question")


def image_paths(record: dict[str, Any]) -> list[str]:
    """The images of a record of a LLaVA file; ValueError unless `image` is a path or a list."""
    image = record.get("image") or []
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"image must be one path or a list of paths, got {image!r}")
    return paths


def check_record(stored: Any, index: int) -> dict[str, Any]:
    """A record (a line of JSON, or its value) in canonical form; ValueError says what is wrong."""
    record = parse_json(stored, "line") if isinstance(stored, bytes) else stored
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError("expected an object with the key conversations")
    if media := [key for key in ("video", "videos", "audio") if record.get(key)]:
        raise ValueError(f"has a {media[0]}, which this model cannot perceive")
    name, paths = str(record.get("id", index)), image_paths(record)
    turns = normalize_turns(record["conversations"], num_images=len(paths))
    # Halves of surrogate pairs are JSON but not text: this raises UnicodeEncodeError.
    json.dumps([name, paths, turns], ensure_ascii=False).encode()
    return {"id": name, **({"image": record["image"]} if paths else {}), "conversations": turns}


def has_blank_answer(record: dict[str, Any]) -> bool:
    """Whether an answer of a canonical record is empty."""
    return any(turn["from"] == "gpt" and not turn["value"] for turn in record["conversations"])


def modality_length(turns: list[dict[str, str]]) -> int:
    """Words of all turns, negative when they show no image, see `GroupedSampler`."""
    words = max(1, sum(len(turn["value"].split()) for turn in turns))
    return words if any(IMAGE_TAG in turn["value"] for turn in turns) else -words


# ---- files


def stored_records(path: str | Path) -> list[Any]:
    """The records of a LLaVA file as they are stored: values of a JSON list, or lines (bytes)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    # The suffix does not tell: LLaVA's lists are .json, but so are lines of other programs.
    # 4096 bytes reach beyond a byte order mark and blank lines.
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


def scan_conversations(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The usable records of a LLaVA file in canonical form, and what is wrong with the others."""
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for i, stored in enumerate(stored_records(path)):
        try:
            records.append(check_record(stored, i))
        except ValueError as error:
            name = stored.get("id", "no id") if isinstance(stored, dict) else type(stored).__name__
            name = "line" if isinstance(stored, bytes) else name
            problems.append(f"record {i} ({name}): {error}")
    return records, problems


def read_conversations(
    path: str | Path, image_folder: str | Path | None = None, *, skip_missing: int = 0
) -> list[dict[str, Any]]:
    """All records of a LLaVA file, checked and in canonical form.

    The images are in `image_folder`, by default next to the file; up to `skip_missing` records that
    lack one are left out and reported. Raises FileNotFoundError when more are missing, ValueError
    when too many records cannot be used, see `leave_out`.
    """
    path = Path(path)
    records, problems = scan_conversations(path)
    leave_out(path, problems, len(records) + len(problems))
    records = _with_images(path, records, Path(image_folder or path.parent), skip_missing)
    if blank := sum(map(has_blank_answer, records)):
        share = f"{blank} of {len(records)} records"
        told = f"{path}: {share} have a blank answer, which teaches to say nothing"
        print(printable(told), file=sys.stderr, flush=True)
    return records


def _with_images(
    path: Path, records: list[dict[str, Any]], folder: Path, skip_missing: int
) -> list[dict[str, Any]]:
    """The records whose images exist, see `read_conversations`."""

    def files_of(record: dict[str, Any]) -> list[Path]:
        return [folder / image for image in image_paths(record)]

    missing = missing_files(chain.from_iterable(map(files_of, records)))
    if not missing:
        return records
    gone = set(missing)
    kept = [record for record in records if gone.isdisjoint(files_of(record))]
    lost = len(records) - len(kept)
    told = (
        f"{path}: {lost} of {len(records)} records show {len(missing)} images that do not exist "
        f"below {folder}"
    )
    names = summary(missing)
    if lost > skip_missing or not kept:
        raise FileNotFoundError(
            f"{told}; fetch them, set image_folder, set skip_missing={lost} to leave these records "
            f"out, or let `vqrae check-data {path} --write-clean NEW` write the others{names}"
        )
    print(printable(f"{told}, left out{names}"), file=sys.stderr, flush=True)
    return kept


class Conversations(TolerantDataset):
    """Records of a LLaVA file -> {"id", ["image": RGB image or a list of them,] "conversations"}.

    Options are those of `read_conversations`.
    """

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
        """Questions and answers of a record."""
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

    fingerprint = staticmethod(file_fingerprint)
