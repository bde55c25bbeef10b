"""Codes that other programs have written, as a code set.

    FILE.jsonl   lines {"tokens": [17, 4, …], "caption": "a dog"}; the codes also as `codes` or `vq_code`, the caption as `text`
                 or `prompt` (1D-tokenizer, Liquid), codes also as the path of a .npy (SimpleAR)
    FOLDER       KEY.npy with the codes of an image or of several crops, (N,) or (…, N), and KEY.txt with the caption
                 (LlamaGen, with classes: the number of the class in LABELS/KEY.npy)

Images of a class data set carry a number instead of a caption (`class_id`); a file of class names, one a line, words it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vqrae.common.files import decode_text, parse_json
from vqrae.data.code_shards import CodeManifest, CodeWriter

CODE_KEYS = ("codes", "tokens", "vq_code")
CAPTION_KEYS = ("caption", "text", "prompt")
CLASS_KEY = "class_id"


class Entry(NamedTuple):
    """What is stored of one image."""

    name: str
    """What messages call it."""
    codes: Any
    caption: str


class ForeignCodes(Protocol):
    """Images by index, as another program has written them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Entry: ...


class JsonLines:
    """The images of a JSON-lines file; only where the lines begin is kept in memory."""

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        self.path, self.class_names, self.starts = path, class_names, list[tuple[int, int]]()
        with path.open("rb") as stream:
            begin = 0
            for number, line in enumerate(stream, 1):
                if line.strip():
                    self.starts.append((number, begin))
                begin += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Entry:
        number, begin = self.starts[index]
        name = f"{self.path}, line {number}"
        with self.path.open("rb") as stream:
            stream.seek(begin)
            line = stream.readline()
        try:
            record = parse_json(line, name)
            codes = next(record[key] for key in CODE_KEYS if key in record)
        except (StopIteration, TypeError):
            raise ValueError(
                f"{name}: expected a JSON object with {', '.join(CODE_KEYS)}"
            ) from None
        if isinstance(codes, str):
            codes = _load(self.path.parent / codes)
        caption = next(
            (record[key] for key in CAPTION_KEYS if isinstance(record.get(key), str)), None
        )
        return Entry(
            name,
            codes,
            caption
            if caption is not None
            else _class_name(record.get(CLASS_KEY), self.class_names, name),
        )


class NumpyFiles:
    """A folder of KEY.npy, with KEY.txt or with class numbers in another folder."""

    def __init__(self, folder: Path, labels: Path | None, class_names: Sequence[str]) -> None:
        self.paths = sorted(
            folder.rglob("*.npy"), key=lambda path: (len(path.name), str(path))
        )  # 2.npy before 10.npy
        self.folder, self.labels, self.class_names = folder, labels, class_names

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Entry:
        path = self.paths[index]
        if self.labels is not None:
            number = _load(self.labels / path.relative_to(self.folder)).reshape(-1)[0]
            return Entry(
                str(path), _load(path), _class_name(int(number), self.class_names, str(path))
            )
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(
                f"{path}: no caption: {text.name} is not beside it, and no folder of labels was given"
            )
        return Entry(str(path), _load(path), decode_text(text.read_bytes(), text).strip())


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a numpy array: {error}") from error


def _class_name(number: Any, names: Sequence[str], where: str) -> str:
    if not isinstance(number, int):
        raise ValueError(
            f"{where}: no caption: expected one of {', '.join(CAPTION_KEYS)}, or {CLASS_KEY}"
        )
    if not 0 <= number < len(names):
        raise ValueError(
            f"{where}: class {number}, but {len(names)} class names were given: name them with a file, one a line"
        )
    return names[number]


def open_foreign(
    source: str | Path, *, labels: str | Path | None = None, class_names: Sequence[str] = ()
) -> ForeignCodes:
    """Codes of another program; see the head of this module for the forms.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: for a file of another kind, or without any codes.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() and path.suffix != ".jsonl":
        raise ValueError(f"{path} is of unknown kind: expected FILE.jsonl or a folder of .npy")
    if path.is_file():
        found: ForeignCodes = JsonLines(path, class_names)
    else:
        found = NumpyFiles(path, Path(labels) if labels is not None else None, class_names)
    if not len(found):
        raise ValueError(
            f"{path} holds no codes: expected lines with {', '.join(CODE_KEYS)}, or .npy files"
        )
    return found


def import_codes(
    foreign: ForeignCodes,
    folder: str | Path,
    *,
    source: str,
    tokenizer_fingerprint: str,
    codebook_size: int,
    grid_size: int,
    shard_size: int = 65_536,
) -> CodeWriter:
    """Write a code set; shards that are complete are kept.

    Args:
        source: where the codes come from, for people.
        tokenizer_fingerprint: of the tokenizer that made them, which nothing in the files can prove.

    Raises:
        ValueError: naming the first image whose codes do not fit the tokenizer.
    """
    crops = len(_rows(foreign[0], codebook_size, grid_size))
    manifest = CodeManifest(
        tokenizer_fingerprint=tokenizer_fingerprint,
        codebook_size=codebook_size,
        grid_size=grid_size,
        source=source,
        num_images=len(foreign) * crops,
        shard_size=-(-shard_size // crops) * crops,  # the crops of an image lie in one shard
        crop="as imported",
        crops_per_image=crops,
    )
    writer = CodeWriter(folder, manifest)
    for shard in range(manifest.num_shards):
        if writer.is_complete(shard):
            continue
        images = manifest.images_of(shard)
        entries = [foreign[i] for i in range(images.start // crops, images.stop // crops)]
        rows = [_rows(entry, codebook_size, grid_size) for entry in entries]
        odd = next(
            (entry.name for entry, codes in zip(entries, rows, strict=True) if len(codes) != crops),
            None,
        )
        if odd is not None:
            raise ValueError(f"{odd}: holds another number of crops than the first image, {crops}")
        writer.write(
            shard,
            np.concatenate(rows),
            [[entry.caption] for entry in entries for _ in range(crops)],
        )
    return writer


def _rows(entry: Entry, codebook_size: int, grid_size: int) -> np.ndarray:
    """The codes of an image, (crops, N)."""
    codes = np.asarray(entry.codes)
    if codes.dtype.kind not in "iu" or not codes.ndim or codes.shape[-1] != grid_size**2:
        raise ValueError(
            f"{entry.name}: holds {codes.dtype} {codes.shape}, expected integers (…, {grid_size**2})"
        )
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(
            f"{entry.name}: holds codes from {codes.min()} to {codes.max()}, expected 0 to {codebook_size - 1}"
        )
    return codes.reshape(-1, grid_size**2)
