"""Remote tars (`s3://`, `https://`, `hf://`, a network drive) as local files, a few at a time.

Random reads over a network cost a round trip each. So a tar is copied as a whole, by sequential
reading, when its first sample is asked for; `TarDataset` then reads the samples of a few tars
before it goes on to the next ones.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vqrae.common.files import atomic_path, with_retries

T = TypeVar("T")


def is_remote(name: str) -> bool:
    """Whether a name is a URL."""
    return "://" in name


def short_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def find(pattern: str) -> list[str]:
    """Names of the files that a glob matches, local or remote; ValueError if the server does not
    answer.
    """
    if not glob.has_magic(pattern):
        return [pattern]
    if not is_remote(pattern):
        return glob.glob(pattern)
    system, path = _file_system(pattern)
    names = with_retries(lambda: _as_os_errors(system.glob, path), pattern)
    return [system.unstrip_protocol(name) for name in names]


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. Not kept across a fork: it may have threads."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from error


def _as_os_errors(call: Callable[..., T], *arguments: Any) -> T:
    """Call a remote file system; its errors become those of storage, which `with_retries` knows."""
    try:
        return call(*arguments)
    except FileNotFoundError:
        raise
    except Exception as error:  # of aiohttp, botocore, huggingface_hub, …
        if isinstance(error, OSError) and error.errno:
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


class Stage:
    """Local copies of the tars of a source, in $TMPDIR, shared by all processes of a machine.

    The `capacity` last used are kept: `fsspec`'s own caches neither bound their size nor lock
    between processes.
    """

    LOCKS = 16  # downloads of a source at the same time

    def __init__(self, source: str, capacity: int) -> None:
        self.capacity = capacity
        self.files = OrderedDict[str, io.FileIO]()  # last used at the end
        self.coming = set[str]()
        root = Path(tempfile.gettempdir()) / f"vqrae-tars-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)  # others may not put their tars there
        if root.stat().st_uid != os.getuid():
            raise OSError(f"{root} belongs to another user: set TMPDIR to a folder of your own")
        self.folder = root / short_hash(source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": OrderedDict()}  # descriptors stay in their process

    def descriptor(self, url: str) -> int:
        """The open copy of a tar, fetched where there is none; ValueError when that fails."""
        while url not in self.files:
            self._fetch(url)
            # Another process may have removed the copy to make room.
            with contextlib.suppress(FileNotFoundError):
                self.files[url] = self._copy(url).open("rb", buffering=0)
        self.files.move_to_end(url)
        while len(self.files) > self.capacity:
            self.files.popitem(last=False)[1].close()
        return self.files[url].fileno()

    def fetch_soon(self, url: str) -> None:
        """Start to fetch a tar that will be asked for."""
        if url not in self.coming and not self._copy(url).exists():
            self.coming.add(url)
            threading.Thread(target=self._fetch_ahead, args=(url,), daemon=True).start()

    def _fetch_ahead(self, url: str) -> None:
        with contextlib.suppress(ValueError, OSError):  # raised again where the tar is needed
            self._fetch(url)
        self.coming.discard(url)

    def _copy(self, url: str) -> Path:
        return self.folder / f"{short_hash(url)}.tar"

    def _fetch(self, url: str) -> None:
        copy = self._copy(url)
        with self._locked(url):
            with contextlib.suppress(FileNotFoundError):  # not there yet, or just removed
                os.utime(copy)  # used now, see `_make_room`
                return
            system, path = _file_system(url)
            with atomic_path(copy) as temporary:
                with_retries(lambda: _as_os_errors(system.get_file, path, str(temporary)), url)
                os.utime(temporary)  # some file systems keep the time of the original
        self._make_room()

    def _make_room(self) -> None:
        """Remove the copies used longest ago; a process that has one open can still read it."""
        used = {}
        for copy in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                used[copy] = copy.stat().st_mtime_ns
        for copy in sorted(used, key=used.__getitem__)[: -self.capacity]:
            copy.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, url: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".lock-{int(short_hash(url), 16) % self.LOCKS}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:  # closing is not enough: a process forked meanwhile has the descriptor, too
                fcntl.flock(lock, fcntl.LOCK_UN)
