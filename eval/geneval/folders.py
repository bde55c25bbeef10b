"""Images in GenEval's folder layout, in and out.

OUT/00000/metadata.jsonl          one record: tag, include, [exclude,] prompt
OUT/00000/samples/00000.png       one image per seed
OUT/00000/grid.png                the same images side by side, for people
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vqrae.common.files import read_json, sha256, write_json, write_text
from vqrae.common.images import IMAGE_SUFFIXES, open_image, save_image, tile
from vqrae.eval.drawing import Order, image_seed
from vqrae.eval.geneval.rules import (
    ColorClassifier,
    Detector,
    KnownImage,
    evaluate_image,
    require_sight,
)
from vqrae.eval.sharding import gather, share


def prompt_folder(folder: str | Path, index: int) -> Path:
    """The folder of prompt number `index`."""
    return Path(folder) / f"{index:05d}"


def sample_path(folder: str | Path, index: int, sample: int) -> Path:
    """Where image number `sample` of prompt number `index` belongs."""
    return prompt_folder(folder, index) / "samples" / f"{sample:05d}.png"


def image_orders(
    folder: str | Path, records: Sequence[dict[str, Any]], images_per_prompt: int
) -> list[Order]:
    """The images that a suite asks for, at their places in `folder`."""
    return [
        Order(record["prompt"], image_seed(index, sample), sample_path(folder, index, sample))
        for index, record in enumerate(records)
        for sample in range(images_per_prompt)
    ]


def write_prompts(folder: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write each record's `metadata.jsonl`.

    Raises:
        ValueError: when the folder already holds other prompts.
    """
    for index, record in enumerate(records):
        path, line = prompt_folder(folder, index) / "metadata.jsonl", json.dumps(record) + "\n"
        if path.exists() and _read_metadata(path) != record:
            raise ValueError(
                f"{path} asks for {_read_metadata(path)['prompt']!r}, expected {record['prompt']!r}: "
                "the folder belongs to another benchmark, give a new one"
            )
        write_text(path, line)


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: every prompt's folder needs its GenEval record"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not one JSON record: got {type(record).__name__}")
    missing = {"tag", "include", "prompt"} - set(record)
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}: expected a GenEval record")
    return record


def read_prompts(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a benchmark folder, in order.

    Raises:
        ValueError: when a prompt's record is missing or broken.
    """
    return [_read_metadata(prompt / "metadata.jsonl") for prompt in _prompt_folders(folder)]


def _prompt_folders(folder: str | Path) -> list[Path]:
    folders = [path for path in Path(folder).glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(folders, key=lambda path: (int(path.name), path.name))


def _samples(prompt: Path) -> list[Path]:
    """The images of a prompt's folder, in the order of their numbers."""
    found: dict[int, Path] = {}
    for path in sorted((prompt / "samples").glob("*")):
        if not (path.stem.isdecimal() and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()):
            continue
        if (other := found.setdefault(int(path.stem), path)) != path:
            raise ValueError(f"{other} and {path} are both sample {int(path.stem)}: keep one")
    return [found[number] for number in sorted(found)]


def list_samples(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every image of a benchmark folder with its record, in the order of the numbers that name folders and images.

    Names are digits alone, the suffix is that of any image format; anything else is ignored.

    Raises:
        ValueError: when a prompt's record is missing or broken, or when two images have the same number.
    """
    for prompt in _prompt_folders(folder):
        metadata = _read_metadata(prompt / "metadata.jsonl")
        for path in _samples(prompt):
            yield path, metadata


def score_folder(
    folder: str | Path,
    detector: Detector,
    classifier: ColorClassifier,
    *,
    known: Sequence[KnownImage],
    progress: Callable[[int, int], None] | None = None,
    broken: dict[str, str] | None = None,
    kept: Path | None = None,
    identity: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Result rows of all images in a benchmark folder; several processes share the work, and all get all rows.

    Args:
        known: images with the records that they satisfy, see `require_sight`.
        progress: called with (images done, images in all).
        broken: takes the images that cannot be read, with the reason; they have no row.
        kept: folder of finished rows, so that an interrupted run scores only the rest.
        identity: which weights judge; kept rows of others are not taken.

    Raises:
        RuntimeError: when the detector is blind.
        ValueError: when the folder holds no images, or none that can be read.
    """
    require_sight(detector, classifier, known)
    samples = list(list_samples(folder))
    if not samples:
        raise ValueError(
            f"{folder} holds no images: expected 00000/metadata.jsonl and 00000/samples/00000.png"
        )
    rows, unreadable, mine = [], [], share(len(samples))
    for done, (path, metadata) in enumerate(samples[mine.start : mine.stop], start=1):
        try:
            image = open_image(path)
        except ValueError as error:
            unreadable.append((str(path), str(error)))
        else:
            file = kept / path.parents[1].name / f"{path.stem}.json" if kept else None
            asked = {
                "image": sha256(path),
                "record": metadata,
                "detector": detector.name,
                "identity": identity,
            }
            row = _kept_row(file, asked)
            if row is None:
                row = evaluate_image(image, metadata, detector, classifier)
                if file is not None:
                    write_json(file, {"asked": asked, "row": row})
            rows.append({**row, "filename": str(path)})
        if progress is not None:
            progress(done, len(mine))
    rows, unreadable = gather(rows), gather(unreadable)
    if not rows:
        raise ValueError(
            f"none of {len(samples)} images can be read; the first: {unreadable[0][1]}"
        )
    if broken is not None:
        broken.update(unreadable)
    return rows


def _kept_row(file: Path | None, asked: dict[str, Any]) -> dict[str, Any] | None:
    stored = read_json(file) if file is not None and file.is_file() else {}
    return stored["row"] if stored.get("asked") == asked else None


def uneven_prompts(folder: str | Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is missing of a benchmark folder: prompts with fewer images than others have. Empty when all is there."""
    folders = _prompt_folders(folder)
    counts = Counter(Path(row["filename"]).parents[1].name for row in rows)
    most = max(counts.values(), default=0)
    return [
        f"{path.name} has {counts[path.name]} of {most} images"
        for path in folders
        if counts[path.name] < most
    ]


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write GenEval's results file, one JSON object per line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_grids(folder: str | Path) -> None:
    """Write each prompt's `grid.png`: its images in two columns, where there are two or more."""
    for prompt in _prompt_folders(folder):
        images = [open_image(path) for path in _samples(prompt)]
        if len(images) > 1:
            save_image(tile(images), prompt / "grid.png")
