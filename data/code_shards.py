"""Pictures as codes: a folder of memory-mapped uint16 shards with captions, made once by a tokenizer, read by the generator.

    manifest.json          what the set is: tokenizer fingerprint, codebook, grid, source, number of pictures
    shard-00000.npy        codes of the pictures 0 … shard_size - 1, uint16 (n, N)
    shard-00000.jsonl      line i: JSON list of the captions of picture i

A shard appears when it is complete (captions first, then codes, each renamed from a temporary file), so a relaunched
extraction skips what is there. 1024 codes take 2 KiB: 36 million pictures fit into 74 GB.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vqrae.common.config import build_config
from vqrae.common.files import atomic_path, read_json, require_same_tokenizer, write_json, write_text

FORMAT_VERSION = 1
MAX_CODEBOOK_SIZE = 1 << 16  # codes are stored as uint16


@dataclass(frozen=True, kw_only=True)
class CodeManifest:
    """Identity of a code set (`manifest.json`)."""

    tokenizer_fingerprint: str
    """`weights_fingerprint` of the tokenizer that made the codes."""
    codebook_size: int
    grid_size: int
    """Codes of one side; a picture has `grid_size ** 2` codes in raster order."""
    source: str
    """Where the pictures come from, for people."""
    num_pictures: int
    shard_size: int
    """Pictures of one shard; the last shard may hold fewer."""
    captions_per_image: int = 1
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"got format_version {self.format_version}, expected {FORMAT_VERSION}: extract the codes again")
        if not 0 < self.codebook_size <= MAX_CODEBOOK_SIZE:
            raise ValueError(
                f"got codebook_size {self.codebook_size}, expected at most {MAX_CODEBOOK_SIZE}: codes are stored as uint16"
            )
        if self.num_pictures < 1 or self.shard_size < 1:
            raise ValueError(f"got {self.num_pictures} pictures in shards of {self.shard_size}, expected at least one of each")

    @property
    def num_codes(self) -> int:
        """Codes of one picture, N."""
        return self.grid_size**2

    @property
    def num_shards(self) -> int:
        return -(-self.num_pictures // self.shard_size)

    def pictures_of(self, shard: int) -> range:
        """Indices of the pictures in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_pictures))


def read_manifest(folder: str | Path) -> CodeManifest:
    """The manifest of a code set.

    Raises:
        FileNotFoundError: when the folder holds no code set.
        ConfigError: when the manifest cannot be read by this version.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no code set: it has no manifest.json. Make it with vqrae.generation.extract_codes"
        )
    return build_config(CodeManifest, read_json(path), source=str(path))


def _shard_paths(folder: Path, shard: int) -> tuple[Path, Path]:
    return folder / f"shard-{shard:05d}.npy", folder / f"shard-{shard:05d}.jsonl"


class CodeWriter:
    """Writes a code set shard by shard, in any order and from several processes.

    Raises:
        ValueError: when the folder holds another code set.
    """

    def __init__(self, folder: str | Path, manifest: CodeManifest) -> None:
        self.folder, self.manifest = Path(folder), manifest
        if (self.folder / "manifest.json").exists():
            existing = read_manifest(self.folder)
            require_same_tokenizer(manifest.tokenizer_fingerprint, existing.tokenizer_fingerprint, f"code set {self.folder}")
            if existing != manifest:
                ours, theirs = dataclasses.asdict(manifest), dataclasses.asdict(existing)
                changes = ", ".join(f"{key} {theirs[key]!r} -> {ours[key]!r}" for key in ours if ours[key] != theirs[key])
                raise ValueError(f"{self.folder} holds another code set ({changes}): set another output_dir, or delete it")
        else:
            write_json(self.folder / "manifest.json", dataclasses.asdict(manifest))

    def is_complete(self, shard: int) -> bool:
        """True when a shard is written; one that cannot be read counts as missing."""
        codes, captions = _shard_paths(self.folder, shard)
        if not (codes.exists() and captions.exists()):
            return False
        try:
            _map_codes(codes, len(self.manifest.pictures_of(shard)), self.manifest)
        except ValueError:
            return False
        return True

    def write(self, shard: int, codes: np.ndarray, captions: Sequence[Sequence[str]]) -> None:
        """Write one shard: codes (n, N) of any integer type, and the captions of each picture.

        Raises:
            ValueError: when shapes or codes do not fit the manifest.
        """
        expected = (len(self.manifest.pictures_of(shard)), self.manifest.num_codes)
        if codes.shape != expected or len(captions) != expected[0]:
            raise ValueError(f"shard {shard}: got codes {codes.shape} and {len(captions)} captions, expected {expected}")
        if codes.min() < 0 or codes.max() >= self.manifest.codebook_size:
            raise ValueError(f"shard {shard}: got codes up to {codes.max()}, expected 0 … {self.manifest.codebook_size - 1}")
        empty = next((i for i, texts in enumerate(captions) if not texts), None)
        if empty is not None:
            raise ValueError(f"shard {shard}: picture {empty} has no caption")
        codes_path, captions_path = _shard_paths(self.folder, shard)
        write_text(captions_path, "".join(json.dumps(list(texts)) + "\n" for texts in captions))
        with atomic_path(codes_path) as temporary, temporary.open("wb") as stream:
            np.save(stream, codes.astype(np.uint16))


def _map_codes(path: Path, rows: int, manifest: CodeManifest) -> np.ndarray:
    """Memory-map one shard.

    Raises:
        ValueError: when the file is cut short, or is not a shard of this set.
    """
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and extract the codes again, the rest is kept") from error
    if codes.dtype != np.uint16 or codes.shape != (rows, manifest.num_codes):
        raise ValueError(f"{path} holds {codes.dtype} {codes.shape}, expected uint16 {(rows, manifest.num_codes)}")
    return codes


@functools.lru_cache(maxsize=256)  # bounds the open files of a set with thousands of shards
def _open_shard(codes: Path, captions: Path, modified_ns: int) -> tuple[np.ndarray, np.ndarray]:
    return np.load(codes, mmap_mode="r", allow_pickle=False), np.memmap(captions, mode="r")


class CodeDataset(Dataset):
    """Pictures of a code set, by index: {"codes": int64 (N,), "caption": str}. Everything is verified on opening.

    Args:
        folder: the code set.
        tokenizer_fingerprint: the tokenizer in use; None accepts any.

    Raises:
        FileNotFoundError: when the folder holds no code set, or not all of it.
        ValueError: when it was made by another tokenizer, or a shard is damaged.
    """

    def __init__(self, folder: str | Path, *, tokenizer_fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        if tokenizer_fingerprint is not None:
            require_same_tokenizer(tokenizer_fingerprint, self.manifest.tokenizer_fingerprint, f"code set {folder}")
        self._line_ends = [self._verify(shard) for shard in range(self.manifest.num_shards)]

    def _verify(self, shard: int) -> np.ndarray:
        """Check one shard and return where the caption lines end, int64 (n,)."""
        codes_path, captions_path = _shard_paths(self.folder, shard)
        rows = len(self.manifest.pictures_of(shard))
        if not (codes_path.exists() and captions_path.exists()):
            raise FileNotFoundError(
                f"{self.folder} lacks shard {shard} of {self.manifest.num_shards}: launch the same extraction again"
            )
        largest = int(_map_codes(codes_path, rows, self.manifest).max())
        if largest >= self.manifest.codebook_size:
            raise ValueError(f"{codes_path} holds code {largest}, expected less than {self.manifest.codebook_size}")
        text = np.memmap(captions_path, mode="r") if captions_path.stat().st_size else np.empty(0, np.uint8)
        line_ends = np.flatnonzero(text == ord("\n"))
        if len(line_ends) != rows or line_ends[-1] != len(text) - 1:
            raise ValueError(
                f"{captions_path} is damaged: {len(line_ends)} whole lines, expected {rows}. "
                f"Delete it and {codes_path.name}, and extract the codes again"
            )
        return line_ends

    def __len__(self) -> int:
        return self.manifest.num_pictures

    def fingerprint(self) -> str:
        """Identity of the set for a run's manifest."""
        text = json.dumps(dataclasses.asdict(self.manifest), sort_keys=True)
        return f"{self.manifest.source}: {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _locate(self, index: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of this code set of {len(self)} pictures")
        shard, row = divmod(index, self.manifest.shard_size)
        codes_path, captions_path = _shard_paths(self.folder, shard)
        return shard, row, *_open_shard(codes_path, captions_path, codes_path.stat().st_mtime_ns)

    def captions(self, index: int) -> list[str]:
        """All captions of a picture."""
        shard, row, _, text = self._locate(index)
        start = self._line_ends[shard][row - 1] + 1 if row else 0
        return json.loads(text[start : self._line_ends[shard][row]].tobytes())

    def sample(self, index: int, draw: int = 0) -> dict[str, Any]:
        """A picture with one of its captions.

        The caption is a pure function of (index, draw): a picture starts at a caption of its own and every further draw
        (in training: every epoch) takes the next, so all captions are seen equally often.
        """
        _, row, codes, _ = self._locate(index)
        captions = self.captions(index)
        first = int.from_bytes(hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest(), "little")
        caption = captions[(first + draw) % len(captions)]
        return {"codes": torch.from_numpy(codes[row].astype(np.int64)), "caption": caption}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index)
