"""Files that are whole or absent (renamed from a temporary name), and robust reading."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_TEMPORARY = re.compile(r"\..+\.(\d+)@([0-9a-f]{8})\.tmp")
_STALE_SECONDS = 24 * 3600  # after which a temporary of another host has no writer
# Control characters, overrides of the writing direction, and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path (file or folder) that replaces `path` when the block succeeds.

    The first write into a folder removes what killed processes left there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_once(path.parent.absolute())
    temporary = _temporary(path)
    replaced = _temporary(path.with_name(f"{path.name}.old"))
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():  # a rename cannot replace a folder that is not empty
            os.replace(path, replaced)
        try:
            os.replace(temporary, path)
        except OSError:
            if replaced.exists():
                os.replace(replaced, path)
            raise
    finally:
        _remove(temporary)
        _remove(replaced)


def discard(folder: Path) -> None:
    """Remove a folder under a temporary name, so that a half removed one is not taken for whole."""
    temporary = _temporary(folder)
    folder.rename(temporary)
    shutil.rmtree(temporary)


def remove_leftovers(folder: Path, *, exclusive: bool = False) -> None:
    """Remove temporaries whose writers are dead, or on another host and idle for a day.

    `exclusive`: the caller holds the folder, so nobody else can be writing.
    """
    for path in folder.glob(".*.tmp"):
        if (match := _TEMPORARY.fullmatch(path.name)) is None:
            continue
        with contextlib.suppress(OSError):  # another process removes it at the same time
            dead = match[2] == _host() and not _is_alive(int(match[1]))
            last_change = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
            if exclusive or dead or time.time() - last_change > _STALE_SECONDS:
                _remove(path)


# Listing a large folder at each write would take quadratic time.
_remove_leftovers_once = functools.lru_cache(maxsize=4096)(remove_leftovers)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}@{_host()}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def _host() -> str:
    """Names the processes that this one can see: other hosts and containers reuse process ids."""
    namespace = Path("/proc/self/ns/pid")
    number = namespace.stat().st_ino if namespace.exists() else 0
    return f"{zlib.crc32(f'{platform.node()} {number}'.encode()):08x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


# ---- reading

_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}
_TRANSIENT |= {errno.ECONNRESET, errno.EREMOTEIO, errno.ENETUNREACH}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # a fault of the machine, not the file
_PAUSES = (0.5, 2.0, 8.0)  # seconds before another try


def with_retries(read: Callable[[], T], name: str | Path) -> T:
    """What `read` returns; transient errors of network storage are retried for ten seconds.

    Raises ValueError, naming `name`, when it still cannot be read; OSError when this process has
    run out of descriptors or memory.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except FileNotFoundError:
            raise ValueError(f"{name}: no such file") from None
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            if pause is None or error.errno not in _TRANSIENT:
                raise ValueError(f"{name}: cannot be read ({error})") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file, see `with_retries`. A pipe is refused, not waited for."""

    def read() -> bytes:
        try:
            # Without O_NONBLOCK a pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except ValueError as error:  # a zero byte, half of a surrogate pair
            raise ValueError(f"{str(path)!r} is not a file name: {error}") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("not a regular file")
            with open(descriptor, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(descriptor)

    return with_retries(read, path)


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows it to, up to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# ---- text


def decode_text(data: bytes, where: str | Path) -> str:
    """UTF-8 with or without a byte order mark -> text; ValueError names `where` and the line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        line = f", line {number}" if b"\n" in data else ""
        raise ValueError(
            f"{where}{line}: not UTF-8 text (byte 0x{data[error.start]:02x}): save it as UTF-8"
        ) from error


def raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content without line end) of each line; only a newline ends one.

    `str.splitlines` also splits at U+2028, U+0085 and form feeds, which JSON and prompts may hold.
    """
    with Path(path).open("rb") as stream:
        for number, line in enumerate(stream, 1):
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line of a UTF-8 file, see `raw_lines` and `decode_text`."""
    for number, line in raw_lines(path):
        yield number, decode_text(line, f"{path}, line {number}")


def parse_json(data: bytes | str, where: str | Path) -> Any:
    """The value of a JSON text. Raises ValueError when it is not JSON, or is nested too deeply."""
    text = decode_text(data, where) if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply") from None


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a JSON Lines file but blank ones, see `parse_json`."""
    for number, line in raw_lines(path):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}")


def printable(text: str) -> str:
    """Text of unknown origin for a terminal: what could steer it is escaped, newlines stay."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column is aligned left, the others right."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]]


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError when the file does not hold JSON, naming the file."""
    return parse_json(Path(path).read_bytes(), path)


# ---- identity


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the safetensors files of a checkpoint folder, the identity of a tokenizer."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors: it is not a checkpoint folder")
    return sha256(*files)


def sha256(*files: Path) -> str:
    """SHA-256 over the content of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):  # weights may be larger than the memory
                digest.update(block)
    return digest.hexdigest()


def require_same_tokenizer(expected: str, found: str, artefact: str) -> None:
    """Refuse, with ValueError, an artefact that was made with another tokenizer."""
    if expected != found:
        raise ValueError(
            f"{artefact} was made with tokenizer {found[:16]}, but the tokenizer in use is "
            f"{expected[:16]}: its codes would decode to noise. Make it again, or name the other."
        )
