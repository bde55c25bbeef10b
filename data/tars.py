"""WebDataset tars (`KEY.jpg` next to `KEY.txt` or `KEY.json`) as map-style data sets.

Each tar is scanned once; the places of its members are kept next to it in `.NAME.index.npy` (or in
the user's cache folder where the tars are read-only) and read from then on, 20 bytes per sample.
Reading any sample is then one or two `pread` calls, so shuffling, sharding and exact resume work as
for any indexed data set, and nothing is unpacked. Measured numbers are in docs/data.md.
"""

import functools
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from itertools import chain, starmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from braceexpand import braceexpand

from vqrae.common.distributed import world_size
from vqrae.common.files import atomic_path, decode_text, parse_json, raise_file_limit, with_retries
from vqrae.common.images import IMAGE_SUFFIXES
from vqrae.data.remote import Stage, find, is_remote, short_hash
from vqrae.data.samples import Encoded, EncodedImages, checksum, name_hash
from vqrae.data.stream import Draw, shuffled

T = TypeVar("T")
_USUAL = ("jpg", "jpeg", "png", "webp")  # looked for before all others
IMAGE_FIELDS = (*_USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*_USUAL}))
# Of a KEY.json: img2dataset (CC12M), others, JourneyDB.
CAPTION_KEYS = ("caption", "text", "prompt")
REMOTE_BUFFER = 8  # tars
# Columns of an index; text size -1: neither KEY.txt nor KEY.json.
_IMAGE_OFFSET, _IMAGE_SIZE, _TEXT_OFFSET, _TEXT_SIZE, _IS_JSON, _HASH = range(6)
_VERSION = 2  # of what a scan finds
_SOURCE = re.compile(r"(.*\.tar)((?:,\w+=[^,\s]+)*)")


# ---- names


def is_tar(source: str) -> bool:
    """True for `FILE.tar`, with or without options."""
    return _SOURCE.fullmatch(source) is not None


def parse_tars(source: str) -> tuple[list[str], Sequence[str], int]:
    """The meaning of `FILE.tar[,caption=KEY][,buffer=TARS]`.

    Returns the tars of the name, glob or range (`shard-{000..012}.tar`); the keys of KEY.json of
    which the first found holds the caption; and the tars that are copied to a local disk at a time,
    0 where samples are read in place. Raises ValueError for an unknown option, or a file system
    that cannot be reached; FileNotFoundError when a tar does not exist, or the glob finds none.
    """
    match = _SOURCE.fullmatch(source)
    assert match, f"{source} is not FILE.tar"
    options = dict(pair.split("=", 1) for pair in match[2].split(",")[1:])
    buffer = options.pop("buffer", str(REMOTE_BUFFER * is_remote(source)))
    caption = options.pop("caption", None)
    if options or not buffer.isdecimal() or (is_remote(source) and buffer == "0"):
        raise ValueError(f"{source}: expected FILE.tar, then ,caption=KEY or ,buffer=TARS")
    paths = sorted(set(chain.from_iterable(map(find, braceexpand(match[1])))))
    missing = [path for path in paths if not is_remote(path) and not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"{source}: no such file: {', '.join(missing[:5]) or source}")
    return paths, [caption] if caption else CAPTION_KEYS, int(buffer)


# ---- indices


def tar_index(path: str, stage: Stage | None = None) -> np.ndarray:
    """The samples of a tar, int64 (1 + samples, 6), after a row with size, time and version.

    It is read from a cache where that is valid. `stage` fetches a remote tar, which is taken to be
    unchanged since it was scanned. Raises ValueError when the tar is damaged or holds no image;
    OSError when the system cannot read it.
    """
    name = path if is_remote(path) else str(Path(path).absolute())
    caches = _index_files(name)
    stamp = None if is_remote(path) else _stamp(os.stat(name))
    for cache in caches:
        stored = _load_index(cache)
        if stored is not None and (stamp is None or stored[0].tolist() == stamp):
            return stored
    if stamp is None:
        assert stage is not None, "a remote tar is fetched to be scanned"
        descriptor = with_retries(lambda: stage.descriptor(name), name)
        stamp = _stamp(os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as stream:
            stream.seek(0)
            rows = _scan_tar(name, stream)
    else:
        rows = _scan_tar(name)
    index = np.concatenate([np.array([stamp]), rows])
    for cache in caches:
        try:
            with atomic_path(cache) as temporary, temporary.open("wb") as file:
                np.save(file, index)
            return index
        except OSError as error:
            problem = error
    print(f"the index of {path} is not kept but made at each start: {problem}", file=sys.stderr)
    return index


def _index_files(name: str) -> list[Path]:
    """Where the index of a tar may be: next to it, or in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqrae" / "tars"
    in_cache = folder / f"{short_hash(name)}.index.npy"
    if is_remote(name):
        return [in_cache]
    return [Path(name).with_name(f".{Path(name).name}.index.npy"), in_cache]


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, _VERSION, 0, 0, 0]


def _load_index(cache: Path) -> np.ndarray | None:
    """The stored index; None when it is absent, unreadable, cut short or of another format."""
    try:
        stored = np.load(cache)
    except (FileNotFoundError, PermissionError, NotADirectoryError, ValueError, EOFError):
        return None
    is_index = stored.ndim == 2 and stored.shape[1] == 6 and len(stored) > 1
    return stored if is_index and stored[0, 2] == _VERSION else None


def _scan_tar(path: str, stream: Any = None) -> np.ndarray:
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:", stream) as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                folder, _, name = member.name.rpartition("/")
                # The convention of WebDataset: the key ends at the first dot.
                key, _, suffix = name.partition(".")
                fields = members.setdefault(f"{folder}/{key}", {})
                fields[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of the tar
            told = f"{path} cannot be read: {os.strerror(error.errno)}"
            raise OSError(error.errno, told) from error
        raise ValueError(
            f"{path} is damaged after {len(members)} samples ({error}): "
            "fetch it again or leave it out"
        ) from error
    rows = list(chain.from_iterable(starmap(_sample_rows, members.items())))
    if not rows:
        raise ValueError(
            f"{path} holds no image: expected KEY.jpg (or {', '.join(IMAGE_FIELDS[1:])}) "
            "with KEY.txt or KEY.json"
        )
    return np.array(rows, dtype=np.int64)


def _sample_rows(key: str, fields: dict[str, tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """The samples among the members of a key, {suffix: place}.

    `a.jpg` is the image of `a`, and `a.mask.png` one of its fields. Without `a.jpg`, members with
    dotted names (`a.v1.jpg`, `a.v1.txt`, `a.v2.jpg`) are samples of their own; WebDataset takes
    them for fields of one sample.
    """
    stems = dict.fromkeys(suffix.rpartition(".")[0] for suffix in fields)
    for stem in [""] if any(field in fields for field in IMAGE_FIELDS) else stems:
        dotted = f"{stem}." if stem else ""
        image = next((fields[dotted + s] for s in IMAGE_FIELDS if dotted + s in fields), None)
        if image is None:
            continue
        texts = (f"{dotted}txt", f"{dotted}json", "txt", "json")
        named = next((name for name in texts if name in fields), "")
        text = fields.get(named, (0, -1))
        yield *image, *text, named.endswith("json"), name_hash(f"{key}.{stem}" if stem else key)


# ---- samples


def _places(tar: int, samples: np.ndarray) -> np.ndarray:
    """Rows of an index as int32 (samples, 5): tar, block and size of the image and of the text.

    The size of a text is -1 for none, and -2 - size for JSON.
    """
    size = samples[:, _TEXT_SIZE]
    columns = [
        np.full(len(samples), tar),
        samples[:, _IMAGE_OFFSET] // tarfile.BLOCKSIZE,
        samples[:, _IMAGE_SIZE],
        samples[:, _TEXT_OFFSET] // tarfile.BLOCKSIZE,
        np.where((samples[:, _IS_JSON] > 0) & (size >= 0), -2 - size, size),
    ]
    # Places are blocks of 512 bytes, of which int32 counts up to 1 TiB.
    return np.stack(columns, axis=1).astype(np.int32)


class TarDataset(EncodedImages):
    """Samples of WebDataset tars; with `captions` those that have KEY.txt or KEY.json.

    With a buffer the order of training is decided here: a seeded permutation of the tars, of which
    `buffer` after `buffer` are shuffled together. It is a function of (seed, epoch, position) like
    any other, so that a resume is exact. `reads_captions` adds the caption that a sample may have.
    """

    def __init__(self, source: str, **options: Any) -> None:
        super().__init__(source, **options)
        raise_file_limit()
        self.paths, self.caption_keys, self.buffer = parse_tars(source)
        self.reads_captions = self.captions
        self.stage = Stage(source, 2 * self.buffer) if self.buffer else None
        # Every process of a launch starts at another tar and finds the indices that the others
        # have made: they share the scanning. Of an index only what is needed is kept.
        start = int(os.environ.get("RANK", "0")) * len(self.paths) // world_size()
        places: dict[int, np.ndarray] = {}
        hashes: dict[int, np.ndarray] = {}
        for tar in [*range(start, len(self.paths)), *range(start)]:
            samples = self._usable(tar, tar_index(self.paths[tar], self.stage)[1:])
            places[tar], hashes[tar] = _places(tar, samples), samples[:, _HASH].copy()
        tars = range(len(self.paths))
        chosen = self.chosen(np.concatenate([hashes[tar] for tar in tars]))
        self.places = np.concatenate([places[tar] for tar in tars])[chosen]
        # Row of the first sample of each tar, int64 (tars + 1,).
        self.first = np.searchsorted(self.places[:, 0], np.arange(len(self.paths) + 1))
        self.training_index = self._buffered_index if self.buffer else None
        self._epoch_order: tuple[int, np.ndarray, np.ndarray] | None = None
        # Shared memory: the sampler of the parent process sets it, loader workers read it.
        self._in_training_order = torch.zeros(1, dtype=torch.uint8).share_memory_()

    def _usable(self, tar: int, samples: np.ndarray) -> np.ndarray:
        """The rows of an index that have what is asked for."""
        if not self.captions or self.optional:
            return samples
        usable, path = samples[samples[:, _TEXT_SIZE] >= 0], self.paths[tar]
        if not len(usable):
            raise ValueError(
                f"{path} holds {len(samples)} images but no caption: "
                "expected KEY.txt or KEY.json for each KEY.jpg"
            )
        if lost := len(samples) - len(usable):
            told = f"{lost} of {len(samples)} images have no caption, left out"
            print(f"{path}: {told}", file=sys.stderr)
        return usable

    def __len__(self) -> int:
        return len(self.places)

    def encoded(self, draw: Draw) -> Encoded:
        tar, image, image_size, text, text_size = self.places[draw].tolist()
        if self.stage and self._in_training_order[0]:
            # The tar that takes the place of this one when the buffer moves on.
            order, _ = self._order(draw.epoch)
            for later in order[np.flatnonzero(order == tar)[0] + self.buffer :][:1]:
                self.stage.fetch_soon(self.paths[later])
        block = self._read(tar, image - 1, tarfile.BLOCKSIZE + image_size)
        # The first field of the header, which is the block before the content.
        member = block[:100].partition(b"\0")[0].decode("utf-8", "replace")
        caption = None
        if self.reads_captions and text_size != -1:
            is_json = text_size < 0
            stored = self._read(tar, text, -2 - text_size if is_json else text_size)
            caption = self._caption(stored, is_json=is_json)
        return Encoded(f"{self.paths[tar]}, {member}", block[tarfile.BLOCKSIZE :], caption)

    def _buffered_index(self, place: int, epoch: int) -> int:
        """The sample at a place of the order of training."""
        self._in_training_order[0] = 1
        order, begins = self._order(epoch)
        turn = int(np.searchsorted(begins, place, side="right")) - 1
        first = turn // self.buffer * self.buffer
        start = int(begins[first])
        stop = int(begins[min(first + self.buffer, len(order))])
        place = start + shuffled(place - start, stop - start, self.seed, epoch, first)
        turn = int(np.searchsorted(begins, place, side="right")) - 1
        return int(self.first[order[turn]] + place - begins[turn])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The tars of an epoch in order, (tars,), and the samples before each, (tars + 1,)."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))
            counts = np.diff(self.first)[order]
            self._epoch_order = epoch, order, np.cumsum([0, *counts])
        return self._epoch_order[1:]

    def _read(self, tar: int, block: int, size: int) -> bytes:
        path = self.paths[tar]

        def read() -> bytes:
            descriptor = self.stage.descriptor(path) if self.stage else _open_tar(path).fileno()
            try:  # `pread`: forked loader workers share the descriptor's position
                return os.pread(descriptor, size, block * tarfile.BLOCKSIZE)
            except OSError:
                _open_tar.cache_clear()  # a handle is dead once a network drive replaced the file
                raise

        data = with_retries(read, path)
        if len(data) < size:
            remedy = f"remove {_index_files(path)[0]} and start" if is_remote(path) else "start"
            raise ValueError(f"{path} has changed since it was scanned: {remedy} again")
        return data

    def _caption(self, text: bytes, *, is_json: bool) -> str | None:
        """The caption in a KEY.txt or KEY.json, None when that cannot be read."""
        try:
            if not is_json:
                return decode_text(text, self.source)
            record = parse_json(text, self.source)
            found = (record.get(key) for key in self.caption_keys)
            caption = next((value for value in found if isinstance(value, str)), None)
            if caption is not None:
                caption.encode()  # halves of surrogate pairs are JSON but not text
            return caption
        except (ValueError, AttributeError):
            return None

    @staticmethod
    def fingerprint(source: str) -> str:
        """Names and sizes of the tars in one number."""
        paths, _, buffer = parse_tars(source)
        stage = Stage(source, 2 * buffer) if buffer else None
        lines = []
        for path in paths:
            size = tar_index(path, stage)[0, 0] if is_remote(path) else os.stat(path).st_size
            lines.append(f"{Path(path).name} {size}")
        listing = "\n".join(lines)
        return f"{len(paths)} tars, crc32 {checksum(listing.encode())}"


@functools.lru_cache(maxsize=128)  # bounds the open files of a set with thousands of tars
def _open_tar(path: str) -> io.FileIO:
    return open(path, "rb", buffering=0)
