"""What data sets of files share: splits, skipping of broken samples, bytes -> cropped tensor."""

import io
import math
import sys
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import ten_crop

from vqrae.common.files import printable
from vqrae.common.images import image_to_uint8, open_image, resize_and_crop, stored_size
from vqrae.data.stream import Draw

FileSplit = Literal["train", "validation", "all"]
Crop = Literal["center", "random", "zoom", "resized", "ten"]
VALIDATION_SHARE = 0.05  # another share would move samples between splits
BROKEN_SHARE = 0.05  # with more than this the source itself is at fault
BROKEN_WINDOW = 100  # samples that the share refers to at least: one broken of three stops nothing
TEN_CROP = 1.1  # LlamaGen cuts its ten crops of 256 pixels out of 281
ZOOM = 0.8  # smallest part of the shorter edge that a zoom keeps


# By what an image must be decoded larger, since the crop is less than its whole edge.
CUTS_OUT = {"zoom": 1 / ZOOM, "resized": 1 / ZOOM, "ten": TEN_CROP}


# ---- names, splits and lists


def utf8(name: str) -> bytes:
    """A name as bytes, also one that is not Unicode (Latin-1 file names)."""
    return name.encode("utf-8", "surrogatepass")


def name_hash(name: str) -> int:
    """A hash of a sample's name that is the same on every machine and in every process."""
    return zlib.crc32(utf8(name))


def checksum(data: bytes) -> str:
    """CRC-32 in hexadecimal: enough to notice that a source has changed."""
    return f"{zlib.crc32(data):08x}"


def split_indices(hashes: np.ndarray, split: FileSplit, source: str) -> np.ndarray:
    """Samples of a split: the 5 % with the largest name hash (at least one) are for validation."""
    if split == "all":
        return np.arange(len(hashes))
    if len(hashes) < 2:
        raise ValueError(
            f"{source} holds {len(hashes)} samples, too few for training and validation: "
            "give more, or split=all"
        )
    held_out = max(1, round(VALIDATION_SHARE * len(hashes)))
    # Stable: samples of one hash keep their order on every machine.
    order = np.argsort(hashes, kind="stable")
    return np.sort(order[-held_out:] if split == "validation" else order[:-held_out])


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` that do not exist; each folder is listed once, for network drives."""
    by_folder: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in paths:
        by_folder[path.parent][path.name] = path
    missing: list[Path] = []
    for folder, names in by_folder.items():
        present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        missing += [path for name, path in names.items() if name not in present]
    return sorted(missing)


def summary(problems: Sequence[Any], limit: int = 5) -> str:
    """The first few problems, one per line, and the number of the others."""
    more = [f"… and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n  ".join(["", *map(str, problems[:limit]), *more])


def leave_out(source: str | Path, problems: list[str], total: int) -> None:
    """Report the entries of a list that are left out; ValueError when they are too many."""
    found = f"{source}: {len(problems)} of {total} entries cannot be used"
    if len(problems) > BROKEN_SHARE * total:
        raise ValueError(
            f"{found}; repair or remove them, or let `vqrae check-data {source} --write-clean NEW` "
            f"write the others{summary(problems)}"
        )
    if problems:
        print(
            printable(f"{found} and are left out{summary(problems)}"), file=sys.stderr, flush=True
        )


# ---- broken samples


class TooManyBrokenSamples(RuntimeError):
    """More samples cannot be read than in a sound source."""


class Unwanted(ValueError):
    """A sound sample that a filter leaves out."""


class BrokenSamples:
    """Names and counts the samples that cannot be used, and stops where they are too many.

    Counts are per process (each loader worker has its own).
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.seen = 0
        self.found: set[Hashable] = set()

    def note(self, sample: Hashable, error: ValueError) -> None:
        """Count a sample that cannot be used, once however often it comes.

        Raises TooManyBrokenSamples when they are more than `BROKEN_SHARE` of the samples seen.
        """
        if sample not in self.found:
            self.found.add(sample)
            told = f"skipped a broken sample ({len(self.found)} of {self.source} so far): {error}"
            print(printable(told), file=sys.stderr, flush=True)
        if len(self.found) > BROKEN_SHARE * max(self.seen, BROKEN_WINDOW):
            raise TooManyBrokenSamples(
                f"{self.source}: {len(self.found)} of the {self.seen} samples read so far are "
                f"broken, the last: {error}. Repair or remove them (messages above name each one), "
                "then start the same command again."
            )


class TolerantDataset(Dataset, ABC):
    """A data set that replaces a broken sample by the next readable one, and reports it.

    Subclasses define `__len__` and `read(draw)`, which raises ValueError for a broken sample and
    `Unwanted` for one that a filter leaves out; that is replaced likewise, but counted apart and
    not reported. Replacement keeps the length and the order exact, so that resuming and sharding
    need no bookkeeping.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.broken = BrokenSamples(source)
        self.unwanted: set[int] = set()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of plain indices (`Trainer` sets it); a `Draw` carries its own."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples, including broken ones."""

    @abstractmethod
    def read(self, draw: Draw) -> dict[str, Any]:
        """The sample of an index in an epoch; ValueError when it is broken."""

    def texts(self, index: int) -> list[str]:
        """What is written in a sample, read without decoding its image."""
        return []

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of {self.source} with {len(self)} samples")
        epoch = index.epoch if isinstance(index, Draw) else self.epoch
        for step in range(len(self)):
            candidate = Draw((index + step) % len(self), epoch)
            self.broken.seen += 1
            try:
                return self.read(candidate)
            except Unwanted:
                self.unwanted.add(int(candidate))
            except ValueError as error:
                self.broken.note(int(candidate), error)
        filtered = f", {len(self.unwanted)} are left out by the filters" if self.unwanted else ""
        raise TooManyBrokenSamples(
            f"{self.source}: none of its {len(self)} samples can be read{filtered}"
        )


# ---- encoded images


class Encoded(NamedTuple):
    """A sample as it is stored."""

    name: str
    """Its name in messages: a path, a member of a tar, a row of a table."""
    data: bytes
    caption: str | None = None


class EncodedImages(TolerantDataset):
    """Images of any kind -> {"image": uint8 (3, H, W)}, with `captions` also {"caption": str}.

    Subclasses define `__len__` and `encoded(draw)`, and `fingerprint(source)` for a run's manifest.

    Args:
        captions: a sample needs a caption; without one it is broken.
        optional: with `captions`, a sample without one has an empty one.
        split: `train` leaves 5 % (by name) to `validation`; `all` is everything.
        size: use the first `size` samples of the split.
        crop: see `fit_image`; decided by (seed, epoch, index) alone, so that a resumed run sees the
            same images.
        draft: decode JPEGs at the smallest eighth of their size that the crop needs: faster, and
            slightly softer.
        min_edge: leave out images whose shorter edge has fewer pixels.
        max_aspect: leave out images whose longer edge is more than this multiple of the shorter; 0
            takes all.
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int,
        captions: bool = False,
        optional: bool = False,
        split: FileSplit = "train",
        size: int | None = None,
        crop: Crop = "center",
        seed: int = 0,
        draft: bool = False,
        min_edge: int = 0,
        max_aspect: float = 0.0,
    ) -> None:
        super().__init__(source)
        self.image_size, self.captions = image_size, captions
        self.optional = optional
        self.split, self.size = split, size
        self.crop, self.seed = crop, seed
        self.draft = math.ceil(image_size * CUTS_OUT.get(crop, 1)) if draft else 0
        self.min_edge, self.max_aspect = min_edge, max_aspect

    def chosen(self, hashes: np.ndarray | list[int]) -> np.ndarray:
        """Indices of the samples to use, given the `name_hash` of all."""
        return split_indices(np.asarray(hashes), self.split, self.source)[: self.size]

    @abstractmethod
    def encoded(self, draw: Draw) -> Encoded:
        """Bytes of a sample and its caption, if it has one; ValueError when they cannot be read."""

    def texts(self, index: int) -> list[str]:
        """The caption of a sample, if it can be read."""
        try:
            caption = self.encoded(Draw(index, 0)).caption
        except ValueError:  # a broken sample, which training skips
            return []
        return [caption] if caption else []

    def image(self, sample: Encoded, draw: Draw) -> Image.Image:
        """Decode a sample as upright RGB; `Unwanted` when a filter leaves it out."""
        if self.min_edge or self.max_aspect:
            short, long = sorted(stored_size(io.BytesIO(sample.data), name=sample.name))
            if short < self.min_edge or (self.max_aspect and long > self.max_aspect * short):
                raise Unwanted(f"{sample.name}: its edges have {short} and {long} pixels")
        return open_image(io.BytesIO(sample.data), name=sample.name, draft=self.draft)

    def read(self, draw: Draw) -> dict[str, Any]:
        sample = self.encoded(draw)
        caption = (sample.caption or "").strip()
        if self.captions and not caption and not self.optional:
            raise ValueError(f"{sample.name}: it has no readable caption")
        rng = None
        if self.crop != "center":
            rng = np.random.default_rng([self.seed, draw.epoch, draw])
        whole = self.image(sample, draw)
        image = fit_image(whole, self.image_size, self.crop, rng, number=draw.epoch)
        return {"image": image, "caption": caption} if self.captions else {"image": image}


def fit_image(
    image: Image.Image,
    size: int,
    crop: Crop = "center",
    rng: np.random.Generator | None = None,
    number: int = 0,
) -> Tensor:
    """RGB image -> uint8 (3, size, size): resize (bicubic, antialiased) and cut out a square.

    `center`; `random`: anywhere along the longer edge (paper, Table 7); `zoom`: a square of 80 to
    100 % of the shorter edge, anywhere; `resized`: see `resized_box`. These three need `rng`.
    `ten`: LlamaGen's ten crops, of which `number` takes one: corners and centre of a square that is
    a tenth larger, then their mirror images. Other mirroring is left to the training loop, where it
    costs nothing.
    """
    if crop == "center":
        return image_to_uint8(resize_and_crop(image, size))
    if crop == "ten":
        larger = resize_and_crop(image, int(size * TEN_CROP))
        return image_to_uint8(ten_crop(larger, [size, size])[number % 10])
    assert rng is not None, "a random crop needs a generator"
    if crop == "resized":
        box = resized_box(image.size, rng)
    else:
        scale = rng.uniform(ZOOM, 1) if crop == "zoom" else 1.0
        edge = max(1, round(min(image.size) * scale))
        left, top = (int(rng.integers(extent - edge + 1)) for extent in image.size)
        box = (left, top, left + edge, top + edge)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return image_to_uint8(image)


def resized_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of 90 to 100 % of the area with an aspect of 3:4 to 4:3, which becomes a square.

    So CLIP and UniTok crop (torchvision's `RandomResizedCrop`). Of an image in which none is found
    it is the centre, as large as that aspect allows.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(0.9, 1)
        aspect = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
