"""Images as files: a folder, or a JSON-lines file of images and captions."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqrae.common.files import parse_json, printable, raw_lines, read_bytes
from vqrae.common.images import IMAGE_SUFFIXES, OTHER_IMAGES
from vqrae.data.samples import (
    Encoded,
    EncodedImages,
    checksum,
    leave_out,
    missing_files,
    name_hash,
    summary,
    utf8,
)
from vqrae.data.stream import Draw


def list_images(folder: str | Path) -> list[Path]:
    """All images below `folder`, sorted by path; hidden files are left out.

    Linked folders are followed. One that is reached in several ways is read once, by its own path
    where it has one below `folder`: so links cannot form a loop, and no image is in both splits.

    Raises FileNotFoundError when there is no such folder, or no image in it.
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
    """All files below a folder, those of linked folders last."""

    def report(error: OSError) -> None:
        told = f"{error.filename} is left out: {error.strerror}"
        print(printable(told), file=sys.stderr, flush=True)

    seen: set[tuple[int, int]] = set()
    starts = [str(folder)]
    while starts:
        links: list[str] = []
        for start in starts:
            for place, folders, files in os.walk(start, onerror=report):
                status = os.stat(place)
                if (status.st_dev, status.st_ino) in seen:  # a link to it came first, or a loop
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                yield from (Path(place, name) for name in files)
                links += filter(os.path.islink, (os.path.join(place, name) for name in folders))
        starts = sorted(links)


class ImageFolder(EncodedImages):
    """Images below a folder; see `EncodedImages` for the options.

    Where captions are needed they are classes, the sub-folders of the folder.

    Raises:
        ValueError: when an image that needs a caption is in no sub-folder.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(str(folder), **options)
        found = list_images(folder)
        self.has_classes = self.captions and not self.optional
        if self.has_classes and any(path.parent == Path(folder) for path in found):
            raise ValueError(
                f"{folder} has no captions: give scenes, emoji, a .jsonl of image and caption, "
                "a .tar of KEY.jpg and KEY.txt, a folder of FOLDER/CLASS/image, or hf:NAME"
            )
        hashes = [name_hash(path.relative_to(folder).as_posix()) for path in found]
        self.paths = [found[i] for i in self.chosen(hashes)]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, draw: Draw) -> Encoded:
        path = self.paths[draw]
        return Encoded(str(path), read_bytes(path), next(iter(self.texts(draw)), None))

    def texts(self, index: int) -> list[str]:
        place = self.paths[index].relative_to(self.source)
        return [place.parts[0]] if self.has_classes else []

    @staticmethod
    def fingerprint(source: str | Path) -> str:
        """Names and sizes of all images below a folder in one number."""
        lines = []
        for path in list_images(source):
            try:
                size = path.stat().st_size
            except OSError:  # a link to nowhere, a broken sample like any other
                size = -1
            lines.append(f"{path.relative_to(source).as_posix()} {size}")
        listing = "\n".join(lines)
        return f"{len(lines)} images, crc32 {checksum(utf8(listing))}"


def file_fingerprint(source: str) -> str:
    """Size and checksum of a file."""
    content = Path(source).read_bytes()
    return f"{len(content)} bytes, crc32 {checksum(content)}"


def parse_pair(line: bytes, where: str) -> tuple[str, str]:
    """(image, caption) of a line {"image": path, "caption": text}; ValueError names `where`."""
    record = parse_json(line, where)
    fields = record if isinstance(record, dict) else {}
    if "conversations" in fields:
        raise ValueError(
            f"{where}: holds a conversation among captions: give conversations a file of their own"
        )
    image, caption = fields.get("image"), fields.get("caption")
    if not isinstance(image, str) or not isinstance(caption, str):
        raise ValueError(f"{where}: image and caption must both be text")
    # JSON may hold halves of surrogate pairs, which are not text: this raises UnicodeEncodeError.
    (image + caption).encode()
    return image, caption.strip()


def scan_jsonl(path: str | Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(image, caption) of each usable line, and what is wrong with each other line."""
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


def read_jsonl(path: str | Path) -> list[tuple[str, str]]:
    """(image, caption) of every line; images are relative to the file's folder.

    Raises FileNotFoundError when an image does not exist, naming the first few; ValueError when
    there is no usable line, or too many cannot be used (see `leave_out`).
    """
    path = Path(path)
    pairs, problems = scan_jsonl(path)
    if not pairs:
        form = '{"image": "image.jpg", "caption": "text"}'
        raise ValueError(f"{path} holds no usable line; each must be {form}{summary(problems)}")
    leave_out(path, problems, len(pairs) + len(problems))
    if missing := missing_files(path.parent / image for image, _ in pairs):
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(pairs)} images do not exist (paths are relative to "
            f"the file's folder): fetch them, or let `vqrae check-data {path} --write-clean NEW` "
            f"write the lines of the others{summary(missing)}"
        )
    return pairs


class CaptionedImages(EncodedImages):
    """Images and captions of a JSON-lines file, see `parse_pair`.

    Without `strict`, lines that cannot be used are left out, and images are looked for only when
    they are read.
    """

    def __init__(self, path: str | Path, *, strict: bool = True, **options: Any) -> None:
        super().__init__(str(path), **options)
        self.folder = Path(path).parent
        found = read_jsonl(path) if strict else scan_jsonl(path)[0]
        hashes = [name_hash(image) for image, _ in found]
        self.pairs = [found[i] for i in self.chosen(hashes)]

    def __len__(self) -> int:
        return len(self.pairs)

    def encoded(self, draw: Draw) -> Encoded:
        image, caption = self.pairs[draw]
        return Encoded(str(self.folder / image), read_bytes(self.folder / image), caption)

    fingerprint = staticmethod(file_fingerprint)
