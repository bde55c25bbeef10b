"""Images in GenEval's folder layout; numbers name folders and images, with zeros or without.

OUT/00000/metadata.jsonl          one record: tag, include, [exclude,] prompt
OUT/00000/samples/00000.png       one image per seed, in any format
OUT/00000/grid.png                the same images side by side, for people
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqrae.common.files import read_json, sha256, write_json, write_text
from vqrae.common.images import IMAGE_SUFFIXES, open_image, save_image, tile
from vqrae.eval.generated import ImageRequest, image_seed
from vqrae.eval.geneval.judges import Judges
from vqrae.eval.geneval.rules import Record, evaluate_image
from vqrae.eval.sharding import map_shared


def sample_path(folder: str | Path, index: int, sample: int) -> Path:
    """Where image number `sample` of prompt number `index` belongs."""
    return Path(folder) / f"{index:05d}" / "samples" / f"{sample:05d}.png"


def image_requests(
    folder: str | Path, records: Sequence[Record], images_per_prompt: int
) -> list[ImageRequest]:
    """The images that a suite asks for, at their places in `folder`."""
    requests = []
    for index, record in enumerate(records):
        for sample in range(images_per_prompt):
            path = sample_path(folder, index, sample)
            requests.append(ImageRequest(record["prompt"], image_seed(index, sample), path))
    return requests


def write_prompts(folder: str | Path, records: Sequence[Record]) -> None:
    """Write each record's `metadata.jsonl`; ValueError when the folder holds other prompts."""
    for index, record in enumerate(records):
        path = Path(folder) / f"{index:05d}" / "metadata.jsonl"
        if path.exists() and (found := _read_record(path)) != record:
            raise ValueError(
                f"{path} asks for {found['prompt']!r}, expected {record['prompt']!r}: the folder "
                "belongs to another benchmark, give a new one"
            )
        write_text(path, json.dumps(record) + "\n")


def _read_record(path: Path) -> Record:
    if not path.is_file():
        raise ValueError(f"{path} is missing: every prompt's folder needs its GenEval record")
    record = read_json(path)
    if not isinstance(record, dict) or not {"tag", "include", "prompt"} <= record.keys():
        raise ValueError(f"{path} is not a GenEval record: expected tag, include and prompt")
    return record


def _prompt_folders(folder: str | Path) -> list[Path]:
    folders = [path for path in Path(folder).glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(folders, key=lambda path: (int(path.name), path.name))


def _images(prompt_folder: Path) -> list[Path]:
    """The images of one prompt, in the order of their numbers."""
    found: dict[int, Path] = {}
    for path in sorted((prompt_folder / "samples").glob("*")):
        if not (path.stem.isdecimal() and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()):
            continue
        if (other := found.setdefault(int(path.stem), path)) != path:
            raise ValueError(f"{other} and {path} are both sample {int(path.stem)}: keep one")
    return [found[number] for number in sorted(found)]


def read_prompts(folder: str | Path) -> list[Record]:
    """The records of a benchmark folder, in order; ValueError when one is missing or broken."""
    return [_read_record(path / "metadata.jsonl") for path in _prompt_folders(folder)]


def list_samples(folder: str | Path) -> list[tuple[Path, Record]]:
    """Every image of a benchmark folder with its record, in the order of their numbers.

    Raises ValueError when a prompt's record is broken, or when two images have the same number.
    """
    samples = []
    for prompt_folder in _prompt_folders(folder):
        record = _read_record(prompt_folder / "metadata.jsonl")
        samples += [(path, record) for path in _images(prompt_folder)]
    return samples


def score_folder(
    folder: str | Path, judges: Judges, kept: Path | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Result rows of all images of a benchmark folder, and the reason for each unreadable image.

    Several processes share the work, and all get all rows. In the folder `kept` are finished rows,
    so that an interrupted run scores only the rest. Raises ValueError when no image can be read.
    """
    samples = list_samples(folder)
    if not samples:
        raise ValueError(
            f"{folder} holds no images: expected 00000/metadata.jsonl and 00000/samples/00000.png"
        )

    def outcome(sample: tuple[Path, Record]) -> dict[str, Any]:
        path, record = sample
        try:
            return {**_row(path, record, judges, kept), "filename": str(path)}
        except ValueError as error:
            return {"filename": str(path), "broken": str(error)}

    outcomes = map_shared(outcome, samples, "scores")
    rows = [row for row in outcomes if "broken" not in row]
    broken = {row["filename"]: row["broken"] for row in outcomes if "broken" in row}
    if not rows:
        first = next(iter(broken.values()))
        raise ValueError(f"none of {len(samples)} images can be read; the first: {first}")
    return rows, broken


def _row(path: Path, record: Record, judges: Judges, kept: Path | None) -> dict[str, Any]:
    image = open_image(path)
    if kept is None:
        return evaluate_image(image, record, judges.detector, judges.classifier)
    # The file is named after everything that decides the row, so one that exists is right.
    asked = json.dumps([sha256(path), record, judges.detector.name, judges.identity])
    file = kept / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
    if not file.is_file():
        write_json(file, evaluate_image(image, record, judges.detector, judges.classifier))
    return read_json(file)


def uneven_prompts(folder: str | Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Prompts with fewer images than others have, in words. Empty when nothing is missing."""
    counts = Counter(Path(row["filename"]).parents[1].name for row in rows)
    most = max(counts.values(), default=0)
    uneven = [path.name for path in _prompt_folders(folder) if counts[path.name] < most]
    return [f"{name} has {counts[name]} of {most} images" for name in uneven]


def write_grids(folder: str | Path) -> None:
    """Write each prompt's `grid.png`: its images in two columns, where there are two or more."""
    for prompt_folder in _prompt_folders(folder):
        images = [open_image(path) for path in _images(prompt_folder)]
        if len(images) > 1:
            save_image(tile(images), prompt_folder / "grid.png")
