"""A folder of pictures as a data set."""

from pathlib import Path

import numpy as np

from vqrae.common.files import read_bytes
from vqrae.common.pictures import PICTURE_SUFFIXES
from vqrae.data.encoded import Crop, Encoded, EncodedPictures
from vqrae.data.stream import Draw
from vqrae.data.tolerant import FileSplit, checksum, name_hash, split_indices


def list_pictures(folder: str | Path) -> list[Path]:
    """All pictures below `folder`, sorted by path; hidden files are left out.

    Raises:
        FileNotFoundError: when there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise FileNotFoundError(f"{folder} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return found


class ImageFolder(EncodedPictures):
    """Pictures below a folder.

    Args:
        size: use the first `size` pictures only.
        split: `train` leaves 5 % (by name) to `validation`; `all` is everything.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_size: int,
        size: int | None = None,
        split: FileSplit = "train",
        crop: Crop = "center",
        seed: int = 0,
    ) -> None:
        super().__init__(str(folder), image_size=image_size, crop=crop, seed=seed)
        found = list_pictures(folder)
        hashes = np.array([name_hash(path.relative_to(folder).as_posix()) for path in found])
        self.paths = [found[i] for i in split_indices(hashes, split, self.source)][:size]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, draw: Draw) -> Encoded:
        path = self.paths[draw]
        return Encoded(str(path), read_bytes(path))


def folder_fingerprint(folder: str | Path) -> str:
    """Names and sizes of all pictures below `folder` in one number."""
    folder = Path(folder)
    found = list_pictures(folder)
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in found)
    return f"{len(found)} pictures, crc32 {checksum(listing.encode())}"
