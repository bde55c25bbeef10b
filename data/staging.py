"""Tars that are far away (`s3://`, `https://`, `hf://`, a network drive) as local files, a few at a time.

Random reads over a network cost a round trip each. So a tar is copied as a whole, by sequential reading, when its first sample
is asked for; training then asks for the samples of a few tars before it goes on to the next (see `TarDataset`). Copies are
shared by all processes of a machine. They are kept in $TMPDIR, the newest of each source only.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqrae.common.files import atomic_path, with_retries

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
