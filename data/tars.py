"""WebDataset tars (`KEY.jpg` beside `KEY.txt`) as map-style data sets.

Each tar is scanned once; where its members lie is kept beside it in `.NAME.index.npy`. Reading any sample is then one seek, so
shuffling, sharding and exact resume work as for any indexed data set, and nothing is unpacked.
"""

import glob
import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from vqrae.common.files import atomic_path
from vqrae.common.pictures import open_picture
from vqrae.data.tolerant import FileSplit, TolerantDataset, checksum, fit_picture, name_hash, split_indices

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_IMAGE_OFFSET, _IMAGE_SIZE, _TEXT_OFFSET, _TEXT_SIZE, _HASH = range(5)  # columns of an index; text size -1: no caption


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


def tar_index(path: Path) -> np.ndarray:
    """Where the samples of a tar lie: int64 (samples, 5), in the order of the tar; read from the cache when it is valid.

    Raises:
        ValueError: when the tar is damaged or holds no picture.
    """
    cache = path.with_name(f".{path.name}.index.npy")
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, 0, 0, 0]
    if (stored := _load_index(cache)) is not None and stored[0].tolist() == stamp:
        return stored[1:]
    index = _scan_tar(path)
    try:
        with atomic_path(cache) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.concatenate([np.array([stamp]), index]))
    except OSError as error:
        print(f"the index of {path} is not kept, and is made anew at each start: {error}", file=sys.stderr, flush=True)
    return index


def _load_index(cache: Path) -> np.ndarray | None:
    """The stored index, or None when it is absent, cut short or of another format."""
    try:
        stored = np.load(cache, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return stored if stored.ndim == 2 and stored.shape[1] == 5 else None


def _scan_tar(path: Path) -> np.ndarray:
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")  # the convention of WebDataset: the key ends at the first dot
                    members.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged after {len(members)} samples ({error}): fetch it again or leave it out") from error
    rows = []
    for key, parts in members.items():
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
        if image is not None:
            text = parts.get("txt")
            text_place = (text.offset_data, text.size) if text else (0, -1)
            rows.append((image.offset_data, image.size, *text_place, name_hash(key)))
    if not rows:
        raise ValueError(
            f"{path} holds no picture: expected members KEY.jpg (or {', '.join(IMAGE_SUFFIXES[1:])}) beside KEY.txt"
        )
    return np.array(rows, dtype=np.int64)


class TarDataset(TolerantDataset):
    """Samples of WebDataset tars -> {"image": uint8 (3, H, W)}, with `captions` also {"caption": str}.

    Args:
        source: a tar, a glob or a brace range.
        captions: leave out pictures that have no `KEY.txt`, and refuse a tar without any.
        augment: random crop and flip (see `ImageFolder`); not for captions, which may say left and right.
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int,
        captions: bool,
        size: int | None = None,
        split: FileSplit = "train",
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(source)
        self.image_size, self.captions, self.augment, self.seed = image_size, captions, augment, seed
        self.paths = expand_tars(source)
        indices = [tar_index(path) for path in self.paths]
        rows = [self._usable(path, index) for path, index in zip(self.paths, indices, strict=True)]
        self.indices = indices
        shard = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
        row = np.concatenate(rows)
        hashes = np.concatenate([index[r, _HASH] for index, r in zip(indices, rows, strict=True)])
        chosen = split_indices(hashes, split, source)[:size]
        self.shard, self.row = shard[chosen], row[chosen]

    def _usable(self, path: Path, index: np.ndarray) -> np.ndarray:
        if not self.captions:
            return np.arange(len(index), dtype=np.int32)
        rows = np.flatnonzero(index[:, _TEXT_SIZE] >= 0).astype(np.int32)
        if not len(rows):
            raise ValueError(f"{path} holds {len(index)} pictures but no caption: expected KEY.txt beside each KEY.jpg")
        if len(rows) < len(index):
            print(f"{path}: {len(index) - len(rows)} of {len(index)} pictures have no KEY.txt, left out", file=sys.stderr)
        return rows

    def __len__(self) -> int:
        return len(self.row)

    def read(self, index: int) -> dict[str, Any]:
        path = self.paths[self.shard[index]]
        place = self.indices[self.shard[index]][self.row[index]]
        name = f"{path}, member at byte {place[_IMAGE_OFFSET]}"
        with path.open("rb") as stream:
            picture = open_picture(io.BytesIO(_read_at(stream, place[_IMAGE_OFFSET], place[_IMAGE_SIZE])), name=name)
            rng = np.random.default_rng([self.seed, self.epoch, index]) if self.augment else None
            sample: dict[str, Any] = {"image": fit_picture(picture, self.image_size, rng)}
            if self.captions:
                text = _read_at(stream, place[_TEXT_OFFSET], place[_TEXT_SIZE])
                sample["caption"] = text.decode("utf-8").strip()  # UnicodeDecodeError is a ValueError: a broken sample
        return sample


def _read_at(stream: io.BufferedReader, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def tars_fingerprint(source: str) -> str:
    """Names and sizes of the tars in one number."""
    paths = expand_tars(source)
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return f"{len(paths)} tars, crc32 {checksum(listing.encode())}"
