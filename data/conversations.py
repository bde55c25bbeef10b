"""LLaVA's conversation files: one JSON list of records {id, [image,] conversations: [{from, value}, …]}.

Everything that can be wrong with a record is found when the file is opened: upstream trains on silently (haotian-liu/LLaVA,
`llava/train/train.py`, checks none of it), and a missing picture stops a run after hours.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from vqrae.common.files import read_json
from vqrae.common.pictures import open_picture
from vqrae.data.stream import Draw
from vqrae.data.tolerant import TolerantDataset, missing_files, summary

IMAGE_TAG = "<image>"


def normalize_turns(turns: Any, *, has_image: bool) -> list[dict[str, str]]:
    """Turns in LLaVA's canonical form: human first, alternating, the image tag at the head of the first question.

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
    if has_image and sum(tags) != 1:
        raise ValueError(f"has an image, but {sum(tags)} {IMAGE_TAG} tags instead of one")
    if not has_image and sum(tags):
        raise ValueError(f"has no image, but {sum(tags)} {IMAGE_TAG} tags")
    if has_image and not tags[0]:
        raise ValueError(f"{IMAGE_TAG} stands in turn {tags.index(1) + 1} instead of the first question")
    clean = [{"from": turn["from"], "value": turn["value"].replace(IMAGE_TAG, "").strip()} for turn in turns]
    if has_image:
        clean[0]["value"] = f"{IMAGE_TAG}\n{clean[0]['value']}"
    return clean


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
    missing = missing_files(folder / record["image"] for record in records if "image" in record)
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
    if image is not None and not isinstance(image, str):
        raise ValueError(f"image must be one path, got {image!r}")
    checked = {"id": str(record.get("id", index))} | ({"image": image} if image else {})
    return {**checked, "conversations": normalize_turns(record["conversations"], has_image=bool(image))}


class Conversations(TolerantDataset):
    """Records of a LLaVA file -> {"id", ["image": RGB picture,] "conversations"}; text-only records have no `image`."""

    def __init__(self, path: str | Path, *, image_folder: str | Path | None = None, size: int | None = None) -> None:
        super().__init__(str(path))
        self.folder = Path(image_folder or Path(path).parent)
        self.records = read_conversations(path, image_folder)[:size]

    def __len__(self) -> int:
        return len(self.records)

    def read(self, draw: Draw) -> dict[str, Any]:
        record = dict(self.records[draw])
        if "image" in record:
            record["image"] = open_picture(self.folder / record["image"])
        return record
