"""A folder of pictures as a data set."""

from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.pictures import PICTURE_SUFFIXES, open_picture
from vqrae.data.tolerant import FileSplit, TolerantDataset, checksum, fit_picture, name_hash, split_indices


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


class ImageFolder(TolerantDataset):
    """Pictures below a folder, of any size, mode and orientation -> {"image": uint8 (3, H, W)}.

    Args:
        size: use the first `size` pictures only.
        split: `train` leaves 5 % (by name) to `validation`; `all` is everything.
        augment: random crop and flip, decided by (seed, epoch, index) alone, so that a resumed run sees the same pictures.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_size: int,
        size: int | None = None,
        split: FileSplit = "train",
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(str(folder))
        self.image_size, self.augment, self.seed = image_size, augment, seed
        found = list_pictures(folder)
        hashes = np.array([name_hash(path.relative_to(folder).as_posix()) for path in found])
        self.paths = [found[i] for i in split_indices(hashes, split, self.source)][:size]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> dict[str, Any]:
        picture = open_picture(self.paths[index])
        rng = np.random.default_rng([self.seed, self.epoch, index]) if self.augment else None
        return {"image": fit_picture(picture, self.image_size, rng)}


def folder_fingerprint(folder: str | Path) -> str:
    """Names and sizes of all pictures below `folder` in one number."""
    folder = Path(folder)
    found = list_pictures(folder)
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in found)
    return f"{len(found)} pictures, crc32 {checksum(listing.encode())}"
