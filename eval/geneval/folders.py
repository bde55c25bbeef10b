"""Pictures in GenEval's folder layout, in and out.

OUT/00000/metadata.jsonl          one record: tag, include, [exclude,] prompt
OUT/00000/samples/00000.png       one picture per seed
OUT/00000/grid.png                the same pictures side by side, for people
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vqrae.common.files import read_json, write_text
from vqrae.common.pictures import open_picture, save_picture, tile
from vqrae.eval.drawing import Order, picture_seed
from vqrae.eval.geneval.rules import ColorClassifier, Detector, KnownPicture, evaluate_image, require_sight
from vqrae.eval.sharding import gather, share


def prompt_folder(folder: str | Path, index: int) -> Path:
    """The folder of prompt number `index`."""
    return Path(folder) / f"{index:05d}"


def sample_path(folder: str | Path, index: int, sample: int) -> Path:
    """Where picture number `sample` of prompt number `index` belongs."""
    return prompt_folder(folder, index) / "samples" / f"{sample:05d}.png"


def picture_orders(folder: str | Path, records: Sequence[dict[str, Any]], images_per_prompt: int) -> list[Order]:
    """The pictures that a suite asks for, at their places in `folder`."""
    return [
        Order(record["prompt"], picture_seed(index, sample), sample_path(folder, index, sample))
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
        raise ValueError(f"{path} is missing: every prompt's folder needs its GenEval record") from None
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
    return sorted(path for path in Path(folder).glob("*") if path.is_dir() and path.name.isdigit())


def list_samples(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every picture of a benchmark folder with its record, sorted. Names are digits alone; anything else is ignored.

    Raises:
        ValueError: when a prompt's record is missing or broken.
    """
    for prompt in _prompt_folders(folder):
        metadata = _read_metadata(prompt / "metadata.jsonl")
        for picture in sorted((prompt / "samples").glob("*")):
            if re.fullmatch(r"\d+\.png", picture.name) and picture.is_file():
                yield picture, metadata


def score_folder(
    folder: str | Path,
    detector: Detector,
    classifier: ColorClassifier,
    *,
    known: Sequence[KnownPicture],
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Result rows of all pictures in a benchmark folder; several processes share the work, and all get all rows.

    Args:
        known: pictures with the records that they satisfy, see `require_sight`.
        progress: called with (pictures done, pictures in all).

    Raises:
        RuntimeError: when the detector is blind.
        ValueError: when the folder holds no pictures, or a broken one.
    """
    require_sight(detector, classifier, known)
    samples = list(list_samples(folder))
    if not samples:
        raise ValueError(f"{folder} holds no pictures: expected 00000/metadata.jsonl and 00000/samples/00000.png")
    rows, mine = [], share(len(samples))
    for done, (path, metadata) in enumerate(samples[mine.start : mine.stop], start=1):
        rows.append(evaluate_image(open_picture(path), metadata, detector, classifier, str(path)))
        if progress is not None:
            progress(done, len(mine))
    return gather(rows)


def uneven_prompts(folder: str | Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is missing of a benchmark folder: prompts with fewer pictures than others have. Empty when all is there."""
    folders = _prompt_folders(folder)
    counts = Counter(Path(row["filename"]).parents[1].name for row in rows)
    most = max(counts.values(), default=0)
    return [f"{path.name} has {counts[path.name]} of {most} pictures" for path in folders if counts[path.name] < most]


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write GenEval's results file, one JSON object per line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_grids(folder: str | Path) -> None:
    """Write each prompt's `grid.png`: its pictures in two columns, where there are two or more."""
    for prompt in _prompt_folders(folder):
        pictures = [open_picture(path) for path in sorted((prompt / "samples").glob("*.png")) if path.stem.isdigit()]
        if len(pictures) > 1:
            save_picture(tile(pictures), prompt / "grid.png")
