"""Images with captions, listed in a JSON-lines file."""

from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.files import parse_json, raw_lines, read_bytes
from vqrae.data.encoded import Encoded, EncodedImages
from vqrae.data.stream import Draw
from vqrae.data.tolerant import (
    FileSplit,
    missing_files,
    name_hash,
    split_indices,
    step_over,
    summary,
)


def scan_jsonl(path: str | Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(image, caption) of each usable line {"image": path, "caption": text}, and what is wrong with each other line.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    for number, line in raw_lines(path):
        if not line.strip():
            continue
        try:
            pairs.append(parse_pair(line, f"line {number}"))
        except ValueError as error:
            problems.append(str(error))
    return pairs, problems


def parse_pair(line: bytes, where: str) -> tuple[str, str]:
    """(image, caption) of a line.

    Raises:
        ValueError: when it cannot be used, naming `where`.
    """
    record = parse_json(line, where)
    if isinstance(record, dict) and "conversations" in record:
        raise ValueError(
            f"{where}: holds a conversation among captions: give conversations a file of their own"
        )
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), str) for key in ("image", "caption")
    ):
        raise ValueError(f"{where}: image and caption must both be text")
    return record["image"], record["caption"].strip()


def read_jsonl(path: str | Path) -> list[tuple[str, str]]:
    """(image, caption) of every line; images lie relative to the file's folder.

    Raises:
        FileNotFoundError: when the file, or an image that it names, does not exist; the first few are listed.
        ValueError: when there is no usable line, or too many cannot be used (see `step_over`).
    """
    path = Path(path)
    pairs, problems = scan_jsonl(path)
    if not pairs:
        form = '{"image": "image.jpg", "caption": "text"}'
        raise ValueError(f"{path} holds no usable line; each must be {form}{summary(problems)}")
    step_over(path, problems, len(pairs) + len(problems))
    missing = [str(file) for file in missing_files(path.parent / image for image, _ in pairs)]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(pairs)} images do not exist (paths are relative to the file's folder): "
            f"fetch them, or let `vqrae check-data {path} --write-clean NEW` write the lines of the others{summary(missing)}"
        )
    return pairs


class CaptionedImages(EncodedImages):
    """Images and captions of a JSON-lines file; see `scan_jsonl` for the format, `ImageFolder` for the split.

    Args:
        strict: False leaves out lines that cannot be used, and looks for images only when they are read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int,
        captions: bool = True,
        size: int | None = None,
        split: FileSplit = "train",
        strict: bool = True,
        **reading: Any,
    ) -> None:
        super().__init__(str(path), image_size=image_size, captions=captions, **reading)
        found, self.folder = read_jsonl(path) if strict else scan_jsonl(path)[0], Path(path).parent
        hashes = np.array([name_hash(image) for image, _ in found])
        self.pairs = [found[i] for i in split_indices(hashes, split, self.source)][:size]

    def __len__(self) -> int:
        return len(self.pairs)

    def encoded(self, draw: Draw) -> Encoded:
        image, caption = self.pairs[draw]
        return Encoded(str(self.folder / image), read_bytes(self.folder / image), caption)
