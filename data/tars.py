"""WebDataset tars (`KEY.jpg` beside `KEY.txt` or `KEY.json`) as map-style data sets.

Each tar is scanned once; where its members lie is kept beside it in `.NAME.index.npy` (or in the user's cache folder where the
tars are read-only) and memory-mapped from then on. Reading any sample is then one or two `pread` calls, so shuffling, sharding
and exact resume work as for any indexed data set, and nothing is unpacked.

Scanning takes about 100 µs per sample of image and text. With many processes each starts at another tar and takes over what
the others have finished, so that they share the work. Measured numbers are in docs/data.md.
"""

import functools
import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from vqrae.common.distributed import world_size
from vqrae.common.files import atomic_path
from vqrae.data.encoded import Crop, Encoded, EncodedPictures
from vqrae.data.stream import Draw
from vqrae.data.tolerant import FileSplit, checksum, name_hash, split_indices

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("caption", "text", "prompt")  # of a KEY.json: img2dataset (CC12M), others, JourneyDB
# Columns of an index; text size -1: neither KEY.txt nor KEY.json.
_IMAGE_OFFSET, _IMAGE_SIZE, _TEXT_OFFSET, _TEXT_SIZE, _IS_JSON, _HASH = range(6)
_SOURCE = re.compile(r"(.*\.tar)(?:,caption=(\S+))?")


def expand_tars(source: str) -> list[Path]:
    """The tars that a name, a glob or a brace range (`shard-{000..012}.tar`) stands for, sorted.

    Raises:
        FileNotFoundError: when one of them does not exist, or the glob finds none.
    """
    paths: list[Path] = []
    for name in braceexpand(source):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        paths += [Path(path) for path in found]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"{source}: no such file: {', '.join(missing[:5]) or source}")
    return sorted(set(paths))


def is_tar(source: str) -> bool:
    """True for `FILE.tar[,caption=KEY]`."""
    return _SOURCE.fullmatch(source) is not None


def parse_tars(source: str) -> tuple[list[Path], str | None]:
    """The tars of `FILE.tar[,caption=KEY]`, and the key of the captions in their KEY.json."""
    match = _SOURCE.fullmatch(source)
    return (expand_tars(match[1]), match[2]) if match else (expand_tars(source), None)


def tar_index(path: Path) -> np.ndarray:
    """Where the samples of a tar lie: int64 (samples, 6), in the order of the tar; read from a cache when it is valid.

    Raises:
        ValueError: when the tar is damaged or holds no picture.
    """
    path, status = path.absolute(), path.stat()
    stamp = [status.st_size, status.st_mtime_ns, 0, 0, 0, 0]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqrae" / "tars"
    place = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    caches = [path.with_name(f".{path.name}.index.npy"), folder / f"{place}.index.npy"]
    for cache in caches:
        if (stored := _load_index(cache)) is not None and stored[0].tolist() == stamp:
            return stored[1:]
    index = _scan_tar(path)
    for cache in caches:
        try:
            with atomic_path(cache) as temporary, temporary.open("wb") as stream:
                np.save(stream, np.concatenate([np.array([stamp]), index]))
            return index
        except OSError as error:
            problem = error
    print(f"the index of {path} is not kept, and is made anew at each start: {problem}", file=sys.stderr, flush=True)
    return index


def tar_indices(paths: list[Path]) -> list[np.ndarray]:
    """The index of each tar. Every process of a launch begins elsewhere, and finds what the others have made."""
    first = int(os.environ.get("RANK", "0")) * len(paths) // world_size()
    found = {path: tar_index(path) for path in paths[first:] + paths[:first]}
    return [found[path] for path in paths]


def _load_index(cache: Path) -> np.ndarray | None:
    """The stored index, or None when it is absent, cut short or of another format."""
    try:
        stored = np.load(cache, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return stored if stored.ndim == 2 and stored.shape[1] == 6 else None


def _scan_tar(path: Path) -> np.ndarray:
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")  # the convention of WebDataset: the key ends at the first dot
                    members.setdefault(f"{folder}/{key}", {})[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged after {len(members)} samples ({error}): fetch it again or leave it out") from error
    rows = []
    for key, parts in members.items():
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
        if image is not None:
            text = parts.get("txt") or parts.get("json") or (0, -1)
            rows.append((*image, *text, "txt" not in parts, name_hash(key)))
    if not rows:
        raise ValueError(
            f"{path} holds no picture: expected members KEY.jpg (or {', '.join(IMAGE_SUFFIXES[1:])}) beside KEY.txt or KEY.json"
        )
    return np.array(rows, dtype=np.int64)


class TarDataset(EncodedPictures):
    """Samples of WebDataset tars; see `ImageFolder` for size and split.

    Args:
        source: a tar, a glob or a brace range; `,caption=KEY` behind it names the caption in the samples' KEY.json, where it is
            none of `caption`, `text`, `prompt`.
        captions: leave out pictures that have neither KEY.txt nor KEY.json, and refuse a tar without any.
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int,
        captions: bool,
        size: int | None = None,
        split: FileSplit = "train",
        crop: Crop = "center",
        seed: int = 0,
    ) -> None:
        super().__init__(source, image_size=image_size, captions=captions, crop=crop, seed=seed)
        self.paths, key = parse_tars(source)
        self.caption_keys = (key,) if key else CAPTION_KEYS
        self.indices = tar_indices(self.paths)
        rows = [self._usable(path, index) for path, index in zip(self.paths, self.indices, strict=True)]
        shard = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
        row = np.concatenate(rows)
        hashes = np.concatenate([index[r, _HASH] for index, r in zip(self.indices, rows, strict=True)])
        chosen = split_indices(hashes, split, source)[:size]
        self.shard, self.row = shard[chosen], row[chosen]

    def _usable(self, path: Path, index: np.ndarray) -> np.ndarray:
        if not self.captions:
            return np.arange(len(index), dtype=np.int32)
        rows = np.flatnonzero(index[:, _TEXT_SIZE] >= 0).astype(np.int32)
        if not len(rows):
            raise ValueError(
                f"{path} holds {len(index)} pictures but no caption: expected KEY.txt or KEY.json beside each KEY.jpg"
            )
        if len(rows) < len(index):
            print(f"{path}: {len(index) - len(rows)} of {len(index)} pictures have no caption, left out", file=sys.stderr)
        return rows

    def __len__(self) -> int:
        return len(self.row)

    def encoded(self, draw: Draw) -> Encoded:
        path, place = self.paths[self.shard[draw]], self.indices[self.shard[draw]][self.row[draw]].tolist()
        block = _read_at(path, place[_IMAGE_OFFSET] - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + place[_IMAGE_SIZE])
        member = block[:100].partition(b"\0")[0].decode("utf-8", "replace")  # the header's first field
        text = _read_at(path, place[_TEXT_OFFSET], place[_TEXT_SIZE]) if place[_TEXT_SIZE] >= 0 else None
        caption = self._caption(text, is_json=bool(place[_IS_JSON])) if text is not None else None
        return Encoded(f"{path}, {member}", block[tarfile.BLOCKSIZE :], caption)

    def _caption(self, text: bytes, *, is_json: bool) -> str | None:
        """What a KEY.txt or KEY.json says, None when that cannot be read."""
        try:
            if not is_json:
                return text.decode("utf-8")
            record = json.loads(text)
            found = (record.get(key) for key in self.caption_keys)
            return next((value for value in found if isinstance(value, str)), None)
        except (ValueError, AttributeError):
            return None


@functools.lru_cache(maxsize=128)  # bounds the open files of a set with thousands of tars
def _open_tar(path: Path) -> io.FileIO:
    return path.open("rb", buffering=0)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    return os.pread(_open_tar(path).fileno(), size, offset)  # moves no shared position: safe in forked loader workers


def tars_fingerprint(source: str) -> str:
    """Names and sizes of the tars in one number."""
    paths, _ = parse_tars(source)
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return f"{len(paths)} tars, crc32 {checksum(listing.encode())}"
