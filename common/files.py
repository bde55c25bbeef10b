"""Files that are whole or absent: written to a temporary name, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path (file or folder) that replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():
            _remove(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: when the file does not hold JSON, naming the file.
    """
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the safetensors files of a checkpoint folder, the identity of a tokenizer.

    Raises:
        FileNotFoundError: when the folder holds no safetensors weights.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file, so it is not a checkpoint folder")
    return sha256(*files)


def sha256(*files: Path) -> str:
    """SHA-256 over the content of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def require_same_tokenizer(expected: str, found: str, artefact: str) -> None:
    """Refuse an artefact that was made with another tokenizer.

    Raises:
        ValueError: naming both fingerprints.
    """
    if expected != found:
        raise ValueError(
            f"{artefact} was made with tokenizer {found[:16]}, but the tokenizer in use is {expected[:16]}: "
            "its codes would decode to noise. Make it again with this tokenizer, or name the other one."
        )
