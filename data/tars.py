"""WebDataset tars (`KEY.jpg` beside `KEY.txt` or `KEY.json`) as map-style data sets.

Each tar is scanned once; where its members lie is kept beside it in `.NAME.index.npy` (or in the user's cache folder where the
tars are read-only) and read whole from then on, 20 bytes a sample. Reading any sample is then one or two `pread` calls, so
shuffling, sharding and exact resume work as for any indexed data set, and nothing is unpacked.

Scanning takes about 100 µs per sample of image and text. With many processes each starts at another tar and takes over what
the others have finished, so that they share the work. Measured numbers are in docs/data.md.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import io
import os
import re
import sys
import tarfile
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from braceexpand import braceexpand

from vqrae.common.distributed import world_size
from vqrae.common.files import atomic_path, decode_text, parse_json, raise_file_limit, with_retries
from vqrae.common.images import IMAGE_SUFFIXES
from vqrae.data.samples import Encoded, EncodedImages, FileSplit, checksum, name_hash, split_indices
from vqrae.data.stream import Draw, shuffled

T = TypeVar("T")
_USUAL = ("jpg", "jpeg", "png", "webp")
IMAGE_FIELDS = (*_USUAL, *sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - {*_USUAL}))
CAPTION_KEYS = (
    "caption",
    "text",
    "prompt",
)  # of a KEY.json: img2dataset (CC12M), others, JourneyDB
# Columns of an index; text size -1: neither KEY.txt nor KEY.json.
_IMAGE_OFFSET, _IMAGE_SIZE, _TEXT_OFFSET, _TEXT_SIZE, _IS_JSON, _HASH = range(6)
_VERSION = 2  # of what a scan finds
_SOURCE = re.compile(r"(.*\.tar)((?:,\w+=[^,\s]+)*)")
REMOTE_BUFFER = 8  # tars


_LOCKS = 16  # of a source: so many tars can be on their way at once


def is_remote(name: str) -> bool:
    """Whether a name is a URL."""
    return "://" in name


def find(pattern: str) -> list[str]:
    """Names of the files that a glob stands for, here or elsewhere.

    Raises:
        ValueError: when the package for such URLs is not installed, or the server does not answer.
    """
    if not glob.has_magic(pattern):
        return [pattern]
    if not is_remote(pattern):
        return glob.glob(pattern)
    system, path = _system(pattern)
    return [
        system.unstrip_protocol(name)
        for name in with_retries(lambda: _quietly(system.glob, path), pattern)
    ]


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. Never kept over a fork: it may have threads."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from error


def _quietly(call: Any, *arguments: Any) -> Any:
    """A call of a file system whose many kinds of errors are those of storage that may get over them."""
    try:
        return call(*arguments)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise error if error.errno else OSError(errno.EIO, str(error)) from error
    except Exception as error:  # of aiohttp, botocore, huggingface_hub, …
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


class Stage:
    """Local copies of the tars of a source.

    Args:
        source: tells the copies of one source from those of others.
        capacity: so many copies are kept.
    """

    def __init__(self, source: str, capacity: int) -> None:
        self.capacity, self.files, self.coming = capacity, OrderedDict[str, Any](), set[str]()
        self.folder = _own_folder() / hashlib.sha256(source.encode()).hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": OrderedDict()}  # descriptors stay in their process

    def descriptor(self, url: str) -> int:
        """The open copy of a tar; it is fetched where there is none.

        Raises:
            ValueError: when it cannot be had.
        """
        if (file := self.files.get(url)) is None:
            file = self.files[url] = self._open(url)
            while len(self.files) > self.capacity:
                self.files.popitem(last=False)[1].close()
        self.files.move_to_end(url)
        return file.fileno()

    def fetch_soon(self, url: str) -> None:
        """Begin to fetch a tar that will be asked for."""
        if url not in self.coming and not self._place(url).exists():
            self.coming.add(url)
            threading.Thread(target=self._fetch_ahead, args=(url,), daemon=True).start()

    def _fetch_ahead(self, url: str) -> None:
        with contextlib.suppress(ValueError, OSError):  # whoever needs it says so
            self._fetch(url)
        self.coming.discard(url)

    def _place(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"

    def _open(self, url: str) -> Any:
        while True:
            self._fetch(url)
            try:
                return self._place(url).open("rb", buffering=0)
            except FileNotFoundError:  # another process has made room
                continue

    def _fetch(self, url: str) -> None:
        place = self._place(url)
        with self._locked(url):
            with contextlib.suppress(FileNotFoundError):  # none yet, or another process makes room
                os.utime(place)
                return
            system, path = _system(url)
            with atomic_path(place) as temporary:
                with_retries(lambda: _quietly(system.get_file, path, str(temporary)), url)
                os.utime(temporary)  # some file systems keep the time of the original
        self._make_room()

    def _make_room(self) -> None:
        """Remove the copies that were used longest ago; processes that have one open keep what they need."""
        found = {}
        for copy in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                found[copy] = copy.stat().st_mtime_ns
        for copy in sorted(found, key=lambda copy: found[copy])[: -self.capacity]:
            copy.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, url: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".lock-{int(self._place(url).stem, 16) % _LOCKS}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:  # closing is not enough: a process forked meanwhile has the descriptor, too
                fcntl.flock(lock, fcntl.LOCK_UN)


def _own_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"vqrae-tars-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    return folder


class TarSource(NamedTuple):
    """What `FILE.tar[,caption=KEY][,buffer=TARS]` stands for."""

    paths: list[str]
    caption: str | None
    """Key of the captions in KEY.json."""
    buffer: int
    """So many tars are copied to a local disk at a time; 0: samples are read where they are, in any order."""


def expand_tars(source: str) -> list[str]:
    """The tars that a name, a glob or a brace range (`shard-{000..012}.tar`) stands for, sorted.

    Raises:
        FileNotFoundError: when one of them does not exist, or the glob finds none.
    """
    paths = [path for name in braceexpand(source) for path in sorted(find(name))]
    missing = [path for path in paths if not is_remote(path) and not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"{source}: no such file: {', '.join(missing[:5]) or source}")
    return sorted(set(paths))


def is_tar(source: str) -> bool:
    """True for `FILE.tar`, with or without options."""
    return _SOURCE.fullmatch(source) is not None


def parse_tars(source: str) -> TarSource:
    """The tars of a source, and how they are read.

    Raises:
        ValueError: for an unknown option.
        FileNotFoundError: see `expand_tars`.
    """
    match = _SOURCE.fullmatch(source)
    options = dict(pair.split("=", 1) for pair in match[2].split(",")[1:]) if match else {}
    buffer = options.pop("buffer", str(REMOTE_BUFFER * is_remote(source)))
    caption = options.pop("caption", None)
    if options or not buffer.isdecimal() or (is_remote(source) and buffer == "0"):
        raise ValueError(f"{source}: expected FILE.tar, and behind it ,caption=KEY or ,buffer=TARS")
    return TarSource(expand_tars(match[1] if match else source), caption, int(buffer))


def tar_index(path: str | Path, stage: Stage | None = None) -> np.ndarray:
    """Where the samples of a tar lie: int64 (samples, 6), in the order of the tar; read from a cache when it is valid.

    Args:
        stage: fetches a remote tar, which is taken to be what it was when it was scanned.

    Raises:
        ValueError: when the tar is damaged or holds no image.
        OSError: when it cannot be read, for instance because too many files are open.
    """
    return _stored_index(path, stage)[1:]


def _stored_index(path: str | Path, stage: Stage | None) -> np.ndarray:
    """The index behind a row with size and time of the tar and the version of the scan."""
    remote = is_remote(str(path))
    name = str(path) if remote else str(Path(path).absolute())
    caches = _index_places(name)
    stamp = None if remote else [*_size_and_time(os.stat(name)), _VERSION, 0, 0, 0]
    for cache in caches:
        stored = _load_index(cache)
        if stored is not None and (
            stored[0].tolist() == stamp if stamp else stored[0, 2] == _VERSION
        ):
            return stored
    if remote:
        assert stage is not None, "a remote tar is fetched to be scanned"
        descriptor = with_retries(lambda: stage.descriptor(name), name)
        stamp = [*_size_and_time(os.fstat(descriptor)), _VERSION, 0, 0, 0]
        with open(descriptor, "rb", closefd=False) as stream:
            stream.seek(0)
            index = _scan_tar(name, stream)
    else:
        index = _scan_tar(name)
    stored = np.concatenate([np.array([stamp]), index])
    for cache in caches:
        try:
            with atomic_path(cache) as temporary, temporary.open("wb") as stream:
                np.save(stream, stored)
            return stored
        except OSError as error:
            problem = error
    print(
        f"the index of {path} is not kept, and is made anew at each start: {problem}",
        file=sys.stderr,
        flush=True,
    )
    return stored


def _index_places(name: str) -> list[Path]:
    """Where the index of a tar may be: beside it, or in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqrae" / "tars"
    own = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.index.npy"
    return (
        [own] if is_remote(name) else [Path(name).with_name(f".{Path(name).name}.index.npy"), own]
    )


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def tar_indices(
    paths: list[str], pick: Callable[[int, np.ndarray], T], stage: Stage | None = None
) -> list[T]:
    """What `pick` takes of the index of each tar: all of them as they are would be large, and memory maps hold descriptors.

    Every process of a launch begins elsewhere, and finds what the others have made.
    """
    first = int(os.environ.get("RANK", "0")) * len(paths) // world_size()
    order = [*range(first, len(paths)), *range(first)]
    found = {i: pick(i, tar_index(paths[i], stage)) for i in order}
    return [found[i] for i in range(len(paths))]


def _load_index(cache: Path) -> np.ndarray | None:
    """The stored index, or None when it is absent, not readable for us, cut short or of another format."""
    try:
        stored = np.load(cache)
    except (FileNotFoundError, PermissionError, NotADirectoryError, ValueError, EOFError):
        return None
    return stored if stored.ndim == 2 and stored.shape[1] == 6 and len(stored) > 1 else None


def _scan_tar(path: str, stream: Any = None) -> np.ndarray:
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:", stream) as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(
                        "."
                    )  # the convention of WebDataset: the key ends at the first dot
                    members.setdefault(f"{folder}/{key}", {})[suffix.lower()] = (
                        member.offset_data,
                        member.size,
                    )
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of the tar
            raise OSError(
                error.errno, f"{path} cannot be read: {os.strerror(error.errno)}"
            ) from error
        raise ValueError(
            f"{path} is damaged after {len(members)} samples ({error}): fetch it again or leave it out"
        ) from error
    rows = [row for key, parts in members.items() for row in _sample_rows(key, parts)]
    if not rows:
        raise ValueError(
            f"{path} holds no image: expected members KEY.jpg (or {', '.join(IMAGE_FIELDS[1:])}) beside KEY.txt or KEY.json"
        )
    return np.array(rows, dtype=np.int64)


def _sample_rows(key: str, parts: dict[str, tuple[int, int]]) -> list[tuple[int, ...]]:
    """The samples among the members of a key, {suffix: place}.

    `a.jpg` is the image of `a`, and `a.mask.png` beside it none of its own. Without it, members of dotted names
    (`a.v1.jpg`, `a.v1.txt`, `a.v2.jpg`) are samples of their own: WebDataset takes them for fields of one sample.
    """
    rows: list[tuple[int, ...]] = []
    for stem in (
        [""]
        if any(s in parts for s in IMAGE_FIELDS)
        else dict.fromkeys(s.rpartition(".")[0] for s in parts)
    ):
        dotted = f"{stem}." if stem else ""
        image = next((parts[dotted + s] for s in IMAGE_FIELDS if dotted + s in parts), None)
        if image is not None:
            named = next(
                (s for s in (f"{dotted}txt", f"{dotted}json", "txt", "json") if s in parts), ""
            )
            text = parts.get(named, (0, -1))
            rows.append(
                (*image, *text, named.endswith("json"), name_hash(f"{key}.{stem}" if stem else key))
            )
    return rows


class TarDataset(EncodedImages):
    """Samples of WebDataset tars; see `ImageFolder` for size and split.

    With a buffer the order of training is decided here: a seeded permutation of the tars, `buffer` after `buffer` of them
    shuffled together. It is a function of (seed, epoch, position) like any other, so that a resume is exact.

    Args:
        source: a tar, a glob or a brace range, local or at a URL; `,caption=KEY` behind it names the caption in the samples'
            KEY.json, where it is none of `caption`, `text`, `prompt`; `,buffer=TARS` see `TarSource`.
        captions: leave out images that have neither KEY.txt nor KEY.json, and refuse a tar without any; False reads none.
            `optional` reads those there are.
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int,
        captions: bool | Literal["optional"],
        size: int | None = None,
        split: FileSplit = "train",
        **reading: Any,
    ) -> None:
        super().__init__(source, image_size=image_size, captions=captions is True, **reading)
        raise_file_limit()
        self.paths, key, self.buffer = parse_tars(source)
        self.caption_keys, self.with_text = (key,) if key else CAPTION_KEYS, bool(captions)
        self.stage = Stage(source, 2 * self.buffer) if self.buffer else None
        picked = tar_indices(self.paths, self._pick, self.stage)
        chosen = split_indices(np.concatenate([hashes for _, hashes in picked]), split, source)[
            :size
        ]
        self.places = np.concatenate([places for places, _ in picked])[chosen]
        self.training_index = self._buffered_index if self.buffer else None
        self._in_training_order = torch.zeros(
            1, dtype=torch.uint8
        ).share_memory_()  # the sampler is asked, workers read
        self._epoch_order: tuple[int, np.ndarray, np.ndarray] | None = None
        self.first = np.searchsorted(
            self.places[:, 0], np.arange(len(self.paths) + 1)
        )  # row of each tar

    def _pick(self, number: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the usable samples: int32 (samples, 5), tar, block and size of the image, of the text; and their hashes.

        A size of text is negative for none (-1) and for JSON (-2 - size).
        """
        if self.captions:
            usable = index[index[:, _TEXT_SIZE] >= 0]
            if not len(usable):
                held = f"{self.paths[number]} holds {len(index)} images"
                raise ValueError(
                    f"{held} but no caption: expected KEY.txt or KEY.json beside each KEY.jpg"
                )
            if len(usable) < len(index):
                told = f"{self.paths[number]}: {len(index) - len(usable)} of {len(index)} images have no caption, left out"
                print(told, file=sys.stderr)
            index = usable
        places = np.empty((len(index), 5), dtype=np.int32)
        places[:, 0] = number
        places[:, 1], places[:, 3] = (
            index[:, _IMAGE_OFFSET] // tarfile.BLOCKSIZE,
            index[:, _TEXT_OFFSET] // tarfile.BLOCKSIZE,
        )
        text_size = index[:, _TEXT_SIZE]
        is_json = (index[:, _IS_JSON] > 0) & (text_size >= 0)
        places[:, 2], places[:, 4] = (
            index[:, _IMAGE_SIZE],
            np.where(is_json, -2 - text_size, text_size),
        )
        return places, index[:, _HASH].copy()

    def __len__(self) -> int:
        return len(self.places)

    def encoded(self, draw: Draw) -> Encoded:
        tar, image, image_size, text, text_size = self.places[draw].tolist()
        if self.stage and self._in_training_order[0]:
            order, _ = self._order(draw.epoch)
            for later in order[np.flatnonzero(order == tar)[0] + self.buffer :][:1]:
                self.stage.fetch_soon(self.paths[later])
        block = self._read(tar, image - 1, tarfile.BLOCKSIZE + image_size)
        member = (
            block[:100].partition(b"\0")[0].decode("utf-8", "replace")
        )  # the header's first field
        caption = None
        if self.with_text and text_size != -1:
            is_json, text_size = text_size < 0, text_size if text_size >= 0 else -2 - text_size
            caption = self._caption(self._read(tar, text, text_size), is_json=is_json)
        return Encoded(f"{self.paths[tar]}, {member}", block[tarfile.BLOCKSIZE :], caption)

    def _buffered_index(self, place: int, epoch: int) -> int:
        """The sample at a place of the order of training."""
        self._in_training_order[0] = 1
        order, ends = self._order(epoch)
        turn = int(np.searchsorted(ends, place, side="right"))
        begin = turn // self.buffer * self.buffer
        start, stop = (
            (int(ends[begin - 1]) if begin else 0),
            int(ends[min(begin + self.buffer, len(order)) - 1]),
        )
        place = start + shuffled(place - start, stop - start, self.seed, epoch, begin)
        turn = int(np.searchsorted(ends, place, side="right"))
        return int(self.first[order[turn]]) + place - (int(ends[turn - 1]) if turn else 0)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The tars of an epoch in their order, and how many samples there are up to the end of each."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))
            self._epoch_order = epoch, order, np.cumsum(np.diff(self.first)[order])
        return self._epoch_order[1:]

    def _read(self, tar: int, block: int, size: int) -> bytes:
        path = self.paths[tar]

        def read() -> bytes:
            descriptor = self.stage.descriptor(path) if self.stage else _open_tar(path).fileno()
            try:  # at a place of its own, so that forked loader workers do not disturb each other
                return os.pread(descriptor, size, block * tarfile.BLOCKSIZE)
            except OSError:
                _open_tar.cache_clear()  # of a file that was replaced on a network drive nothing can be read any more
                raise

        data = with_retries(read, path)
        if len(data) < size:
            remedy = f"remove {_index_places(path)[0]} and start" if is_remote(path) else "start"
            raise ValueError(f"{path} has changed since it was scanned: {remedy} again")
        return data

    def _caption(self, text: bytes, *, is_json: bool) -> str | None:
        """What a KEY.txt or KEY.json says, None when that cannot be read."""
        try:
            if not is_json:
                return decode_text(text, self.source)
            record = parse_json(text, self.source)
            found = (record.get(key) for key in self.caption_keys)
            return next((value for value in found if isinstance(value, str)), None)
        except (ValueError, AttributeError):
            return None


@functools.lru_cache(maxsize=128)  # bounds the open files of a set with thousands of tars
def _open_tar(path: str) -> io.FileIO:
    return open(path, "rb", buffering=0)


def tars_fingerprint(source: str) -> str:
    """Names and sizes of the tars in one number."""
    paths, _, buffer = parse_tars(source)
    stage = Stage(source, 2 * buffer) if buffer else None
    sizes = [
        _stored_index(path, stage)[0, 0] if is_remote(path) else os.stat(path).st_size
        for path in paths
    ]
    listing = "\n".join(
        f"{Path(path).name} {size}" for path, size in zip(paths, sizes, strict=True)
    )
    return f"{len(paths)} tars, crc32 {checksum(listing.encode())}"
