"""Images as codes: a folder of memory-mapped uint16 shards with captions, for the generator.

    manifest.json          tokenizer fingerprint, codebook, grid, crop, source, number of images
    shard-00000.npy        codes of the images 0 … shard_size - 1, uint16 (M, N) or (M, N, n)
    shard-00000.jsonl      line i: JSON list of the captions of image i
    index-00000.npy        int64 (2 + M,): CRC-32 of codes and captions, then the line ends

Each file is renamed from a temporary one, and the index is written last: a shard with an index is
complete, so a relaunched extraction skips it. Opening a set looks at the sizes of its files only;
`vqrae check-data` reads all of them. 1024 codes take 2 KiB: 36 million images fit into 74 GB.

Shapes: M images of a shard, N visual tokens of an image, n codebooks if there are several.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from vqrae.common.config import build_config
from vqrae.common.files import atomic_path, read_json, require_same_tokenizer, write_json
from vqrae.data.stream import Draw

FORMAT_VERSION = 2
MAX_CODEBOOK_SIZE = 1 << 16  # codes are stored as uint16


@dataclass(frozen=True, kw_only=True)
class CodeManifest:
    """Identity of a code set (`manifest.json`)."""

    tokenizer_fingerprint: str
    """`weights_fingerprint` of the tokenizer that made the codes."""
    codebook_size: int
    """Of each codebook."""
    num_codebooks: int = 1
    """n, the codes of a visual token; sets from before there were several do not say it."""
    grid_size: int
    """Visual tokens of one side; an image has `grid_size ** 2` in raster order."""
    source: str
    """Where the images come from, as in `scenes (train, seed 0)`."""
    num_images: int
    """Each crop of an image counts."""
    shard_size: int
    """Images of one shard; the last shard may hold fewer."""
    captions_per_image: int = 1
    crop: str = "center"
    """Which square of an image was encoded, see `vqrae.data.samples.fit_image`."""
    crops_per_image: int = 1
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"got format_version {self.format_version}, expected {FORMAT_VERSION}: "
                "extract the codes again"
            )
        if not 0 < self.codebook_size <= MAX_CODEBOOK_SIZE:
            raise ValueError(
                f"got codebook_size {self.codebook_size}, expected at most {MAX_CODEBOOK_SIZE}: "
                "codes are stored as uint16"
            )
        if min(self.num_images, self.shard_size, self.num_codebooks) < 1:
            raise ValueError(
                f"got {self.num_images} images in shards of {self.shard_size} with "
                f"{self.num_codebooks} codebooks, expected at least one of each"
            )

    @property
    def num_codes(self) -> int:
        """Visual tokens of one image, N."""
        return self.grid_size**2

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the codes of one image: (N,), or (N, n) of several codebooks."""
        several = self.num_codebooks > 1
        return (self.num_codes, self.num_codebooks) if several else (self.num_codes,)

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def images_of(self, shard: int) -> range:
        """Indices of the images in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))


def is_code_set(folder: str | Path) -> bool:
    """Whether a folder holds a code set (run directories have a `manifest.json` too)."""
    path = Path(folder) / "manifest.json"
    return path.is_file() and "shard_size" in read_json(path)


def read_manifest(folder: str | Path) -> CodeManifest:
    """The manifest of a code set.

    Raises:
        FileNotFoundError: when the folder holds no code set.
        ConfigError: when this version cannot read the manifest.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a code set: it has no manifest.json. "
            "Make it with vqrae.generation.extract_codes"
        )
    return build_config(CodeManifest, read_json(path), source=str(path))


# ---- shards


def shard_files(folder: Path, shard: int) -> tuple[Path, Path, Path]:
    """Codes, captions and index of a shard."""
    name = f"{shard:05d}"
    codes, captions = folder / f"shard-{name}.npy", folder / f"shard-{name}.jsonl"
    return codes, captions, folder / f"index-{name}.npy"


class Shard(NamedTuple):
    """A memory-mapped shard."""

    codes: np.ndarray
    """uint16 (M, N) or (M, N, n)"""
    text: np.ndarray
    """uint8, all caption lines"""
    line_ends: np.ndarray
    """int64 (M,), places of the line breaks in `text`"""

    def captions(self, row: int) -> list[str]:
        """All captions of an image."""
        start = self.line_ends[row - 1] + 1 if row else 0
        return json.loads(self.text[start : self.line_ends[row]].tobytes())


def open_shard(folder: Path, shard: int, manifest: CodeManifest, *, verify: bool = False) -> Shard:
    """Memory-map a shard.

    Args:
        verify: read all of it and compare it with its checksums.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is cut short, changed, or belongs to another set.
    """
    files, rows = shard_files(folder, shard), len(manifest.images_of(shard))
    if not all(path.exists() for path in files):
        raise FileNotFoundError(
            f"{folder} lacks shard {shard} of {manifest.num_shards}: "
            "launch the same extraction again"
        )
    codes_file, captions_file, index_file = files
    codes = _map(codes_file, np.uint16, (rows, *manifest.code_shape))
    index = _map(index_file, np.int64, (2 + rows,))
    size = captions_file.stat().st_size
    if size != index[-1] + 1:
        raise _damaged(captions_file, f"{size} bytes, expected {index[-1] + 1}")
    text = np.memmap(captions_file, mode="r")
    stored = [(codes_file, codes, index[0]), (captions_file, text, index[1])]
    for path, data, expected in stored if verify else []:
        if zlib.crc32(np.ascontiguousarray(data).data) != expected:
            raise _damaged(path, "it has changed since it was written")
    return Shard(codes, text, index[2:])


def _map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    if array.dtype != dtype or array.shape != shape:
        expected = f"{np.dtype(dtype)} {shape}"
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected {expected}")
    return array


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}): delete it and extract the codes again, "
        "the other shards are kept"
    )


class CodeWriter:
    """Writes a code set shard by shard, in any order and from several processes.

    Raises ValueError when the folder holds another code set.
    """

    def __init__(self, folder: str | Path, manifest: CodeManifest) -> None:
        self.folder, self.manifest = Path(folder), manifest
        if not (self.folder / "manifest.json").exists():
            write_json(self.folder / "manifest.json", dataclasses.asdict(manifest))
            return
        existing = read_manifest(self.folder)
        require_same_tokenizer(
            manifest.tokenizer_fingerprint,
            existing.tokenizer_fingerprint,
            f"code set {self.folder}",
        )
        ours, theirs = dataclasses.asdict(manifest), dataclasses.asdict(existing)
        changes = [f"{k} {theirs[k]!r} -> {ours[k]!r}" for k in ours if ours[k] != theirs[k]]
        if changes:
            raise ValueError(
                f"{self.folder} holds another code set ({', '.join(changes)}): "
                "set another output_dir, or delete it"
            )

    def is_complete(self, shard: int) -> bool:
        """True when a shard is written; one that cannot be read counts as missing."""
        try:
            open_shard(self.folder, shard, self.manifest)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def write(self, shard: int, codes: np.ndarray, captions: Sequence[Sequence[str]]) -> None:
        """Write one shard: codes (M, N) or (M, N, n), and the captions of each image.

        Raises ValueError when shapes or codes do not fit the manifest.
        """
        expected = (len(self.manifest.images_of(shard)), *self.manifest.code_shape)
        if codes.shape != expected or len(captions) != expected[0]:
            raise ValueError(
                f"shard {shard}: got codes {codes.shape} and {len(captions)} captions, "
                f"expected {expected}"
            )
        if codes.min() < 0 or codes.max() >= self.manifest.codebook_size:
            raise ValueError(
                f"shard {shard}: got codes up to {codes.max()}, "
                f"expected 0 … {self.manifest.codebook_size - 1}"
            )
        empty = next((i for i, texts in enumerate(captions) if not texts), None)
        if empty is not None:
            raise ValueError(f"shard {shard}: image {empty} has no caption")
        codes_file, captions_file, index_file = shard_files(self.folder, shard)
        index_file.unlink(missing_ok=True)  # of a damaged shard, until the new one is whole
        lines = [json.dumps(list(texts)).encode() + b"\n" for texts in captions]
        text, stored = b"".join(lines), np.ascontiguousarray(codes, dtype=np.uint16)
        with atomic_path(captions_file) as temporary:
            temporary.write_bytes(text)
        _save(codes_file, stored)
        ends = np.cumsum([len(line) for line in lines]) - 1
        checksums = [zlib.crc32(stored.data), zlib.crc32(text)]
        _save(index_file, np.concatenate([checksums, ends]).astype(np.int64))


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


# ---- reading


@functools.lru_cache(maxsize=256)  # bounds the open files of a set with thousands of shards
def _open_shard(folder: Path, shard: int, manifest: CodeManifest, written: int) -> Shard:
    return open_shard(folder, shard, manifest)


class CodeDataset(Dataset):
    """Images of a code set, by index: {"codes": int64 (N,) or (N, n), "caption": str}.

    The caption is a pure function of (index, epoch): an image starts at a caption of its own and
    every further epoch takes the next, so all captions are seen equally often.

    Args:
        folder: the code set.
        tokenizer_fingerprint: the tokenizer in use; None accepts any.

    Raises:
        FileNotFoundError: when the folder holds no code set, or not all of it.
        ValueError: when it was made by another tokenizer, or a file does not have its size.
    """

    def __init__(self, folder: str | Path, *, tokenizer_fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        if tokenizer_fingerprint is not None:
            require_same_tokenizer(
                tokenizer_fingerprint, self.manifest.tokenizer_fingerprint, f"code set {folder}"
            )
        for shard in range(self.manifest.num_shards):
            open_shard(self.folder, shard, self.manifest)

    def __len__(self) -> int:
        return self.manifest.num_images

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of this code set of {len(self)} images")
        shard, row = divmod(int(index), self.manifest.shard_size)
        _, _, index_file = shard_files(self.folder, shard)
        # The time is a part of the key: a shard may be written again meanwhile.
        written = index_file.stat().st_mtime_ns
        return _open_shard(self.folder, shard, self.manifest, written), row

    def texts(self, index: int) -> list[str]:
        """All captions of an image."""
        shard, row = self._locate(index)
        return shard.captions(row)

    def distinct_captions(self) -> set[str]:
        """All captions, each once: classes are few, however many images have them."""
        lines: set[bytes] = set()
        for shard in range(self.manifest.num_shards):
            text = open_shard(self.folder, shard, self.manifest).text
            lines.update(text.tobytes().splitlines())
        return set(chain.from_iterable(map(json.loads, lines)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = self._locate(index)
        codes, captions = shard.codes[row].astype(np.int64), shard.captions(row)
        if codes.max() >= self.manifest.codebook_size:
            raise ValueError(
                f"{self.folder}: image {index} holds code {codes.max()}, expected less than "
                f"{self.manifest.codebook_size}. Find the damaged shards with: "
                f"vqrae check-data {self.folder}"
            )
        digest = hashlib.blake2b(int(index).to_bytes(8, "little"), digest_size=8).digest()
        epoch = index.epoch if isinstance(index, Draw) else 0
        caption = captions[(int.from_bytes(digest, "little") + epoch) % len(captions)]
        return {"codes": torch.from_numpy(codes), "caption": caption}

    @staticmethod
    def fingerprint(source: str | Path) -> str:
        """Identity of a code set for a run's manifest."""
        manifest = read_manifest(source)
        values = dataclasses.asdict(manifest)
        if manifest.num_codebooks == 1:
            del values["num_codebooks"]  # as of a set that does not say it
        text = json.dumps(values, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"codes of {manifest.source}, manifest sha256 {digest}"
