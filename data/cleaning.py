"""What is fit for training of a list (LLaVA's records, captioned images), as another list."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from vqrae.common.files import decode_text, raw_lines, write_text
from vqrae.data.checks import Examine, remarks_on
from vqrae.data.conversations import check_record, image_paths, stored_records
from vqrae.data.pairs import parse_pair
from vqrae.data.sources import source_kind


class Kept(NamedTuple):
    """Entries that were written, and entries of the source."""

    written: int
    total: int


def require_target(source: str, out: str | Path, image_folder: str | Path | None = None) -> None:
    """Refuse what `write_clean` cannot write.

    Raises:
        ValueError: when the source is no list, or paths in `out` would lead elsewhere.
    """
    path, out, kind = Path(source), Path(out), source_kind(source)
    if kind not in ("json", "jsonl") or out.suffix not in (
        (".jsonl",) if kind == "jsonl" else (".json", ".jsonl")
    ):
        raise ValueError(
            f"got {source} and {out}, expected a FILE.json or FILE.jsonl and another of its kind"
        )
    if image_folder is None and out.resolve().parent != path.resolve().parent:
        raise ValueError(
            f"{out} must be in the folder of {path}, for images are named relative to that"
        )
    if out.resolve() == path.resolve():
        raise ValueError(f"{out} is the source itself: give another file")


def write_clean(
    source: str,
    out: str | Path,
    *,
    unfit: Collection[str],
    image_folder: str | Path | None = None,
    examine: Examine | None = None,
) -> Kept:
    """Write the usable entries of FILE.json or FILE.jsonl, unchanged; a list to *.json, lines to *.jsonl.

    Args:
        unfit: images that are missing or broken, `DataReport.unfit`; entries that show one are left out.
        image_folder: where the images of LLaVA's records lie; the file's own folder when not given.
        examine: as for `check_source`.

    Raises:
        ValueError: see `require_target`.
    """
    require_target(source, out, image_folder)
    path, unfit, is_pairs = Path(source), set(unfit), source_kind(source) == "jsonl"
    folder = Path(image_folder or path.parent)

    def is_usable(index: int, entry: Any) -> bool:
        try:
            names = _captioned_image(entry) if is_pairs else _record_images(index, entry, examine)
        except ValueError:
            return False
        return all(str(folder / name) not in unfit and (folder / name).is_file() for name in names)

    stored = (
        [line for _, line in raw_lines(path) if line.strip()] if is_pairs else stored_records(path)
    )
    usable = [entry for index, entry in enumerate(stored) if is_usable(index, entry)]
    texts = [
        decode_text(entry, path) if isinstance(entry, bytes) else json.dumps(entry)
        for entry in usable
    ]
    as_lines = Path(out).suffix == ".jsonl"
    write_text(
        out,
        "".join(f"{text}\n" for text in texts) if as_lines else "[\n" + ",\n".join(texts) + "\n]\n",
    )
    return Kept(len(usable), len(stored))


def _captioned_image(line: bytes) -> list[str]:
    image, caption = parse_pair(line, "line")
    if not caption:
        raise ValueError("the caption is empty")
    return [image]


def _record_images(index: int, stored: Any, examine: Examine | None) -> list[str]:
    record = check_record(stored, index)
    if any(remark.unusable for remark in remarks_on(record, examine)):
        raise ValueError("training would learn nothing from it")
    return image_paths(record)
