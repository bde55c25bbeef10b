"""A folder of images as a data set."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.files import parse_json, printable, raw_lines, read_bytes
from vqrae.common.images import IMAGE_SUFFIXES, OTHER_IMAGES
from vqrae.data.samples import (
    Encoded,
    EncodedImages,
    FileSplit,
    checksum,
    missing_files,
    name_hash,
    split_indices,
    step_over,
    summary,
    utf8,
)
from vqrae.data.stream import Draw


def list_images(folder: str | Path) -> list[Path]:
    """All images below `folder`, sorted by path; hidden files are left out.

    Linked folders are followed. One that is reached in several ways is read once, by its own path where it has one below
    `folder`: so links cannot run in circles, and no image is in both splits.

    Raises:
        FileNotFoundError: when there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    files = [path for path in _walk(folder) if not path.name.startswith(".")]
    found = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() in OTHER_IMAGES)
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        print(f"{folder}: left out what cannot be read here: {counts}", file=sys.stderr, flush=True)
    if not found:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, those behind links last."""

    def report(error: OSError) -> None:
        print(
            printable(f"{error.filename} is left out: {error.strerror}"),
            file=sys.stderr,
            flush=True,
        )

    seen: set[tuple[int, int]] = set()
    starts = [str(folder)]
    while starts:
        links = []
        for start in starts:
            for place, folders, files in os.walk(start, onerror=report):
                status = os.stat(place)
                if (identity := (status.st_dev, status.st_ino)) in seen:
                    folders.clear()
                    continue
                seen.add(identity)
                yield from (Path(place, name) for name in files)
                links += [
                    path
                    for path in (os.path.join(place, name) for name in folders)
                    if os.path.islink(path)
                ]
        starts = sorted(links)


class ImageFolder(EncodedImages):
    """Images below a folder.

    Args:
        size: use the first `size` images only.
        split: `train` leaves 5 % (by name) to `validation`; `all` is everything.
        reading: how images are read, see `EncodedImages`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_size: int,
        size: int | None = None,
        split: FileSplit = "train",
        **reading: Any,
    ) -> None:
        super().__init__(str(folder), image_size=image_size, **reading)
        found = list_images(folder)
        hashes = np.array([name_hash(path.relative_to(folder).as_posix()) for path in found])
        self.paths = [found[i] for i in split_indices(hashes, split, self.source)][:size]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, draw: Draw) -> Encoded:
        path = self.paths[draw]
        return Encoded(str(path), read_bytes(path))


def folder_fingerprint(folder: str | Path) -> str:
    """Names and sizes of all images below `folder` in one number."""
    folder = Path(folder)
    found = list_images(folder)
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {_size(path)}" for path in found)
    return f"{len(found)} images, crc32 {checksum(utf8(listing))}"


def _size(path: Path) -> int:
    """Bytes of a file; -1 for a link that leads nowhere, a broken sample like any other."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


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
