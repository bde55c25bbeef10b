"""What all sources of encoded images share: bytes -> a decoded, cropped uint8 tensor, with or without its caption."""

import io
import math
from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqrae.common.images import open_image, resize_and_crop, stored_size
from vqrae.data.stream import Draw
from vqrae.data.tolerant import TolerantDataset, Unwanted

Crop = Literal["center", "random", "zoom"]
ZOOM = 0.8  # smallest part of the shorter edge that a zoom keeps


class Encoded(NamedTuple):
    """A sample as it is stored."""

    name: str
    """What messages call it: a path, a member of a tar, a row of a table."""
    data: bytes
    caption: str | None = None


class EncodedImages(TolerantDataset):
    """Images of any size, mode and orientation -> {"image": uint8 (3, H, W)}, with `captions` also {"caption": str}.

    Subclasses give `__len__` and `encoded(draw)`.

    Args:
        captions: a sample needs a caption; without one it is broken.
        crop: see `fit_image`; decided by (seed, epoch, index) alone, so that a resumed run sees the same images.
        draft: decode JPEGs at the smallest eighth of their size that the crop needs: faster, and slightly softer.
        min_edge: leave out images whose shorter edge has fewer pixels.
        max_aspect: leave out images whose longer edge is more than so many times the shorter; 0 takes all.
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int,
        captions: bool = False,
        crop: Crop = "center",
        seed: int = 0,
        draft: bool = False,
        min_edge: int = 0,
        max_aspect: float = 0.0,
    ) -> None:
        super().__init__(source)
        self.image_size, self.captions, self.crop, self.seed = image_size, captions, crop, seed
        self.draft = math.ceil(image_size / (ZOOM if crop == "zoom" else 1)) if draft else 0
        self.min_edge, self.max_aspect = min_edge, max_aspect

    @abstractmethod
    def encoded(self, draw: Draw) -> Encoded:
        """The stored bytes of a sample and its caption, if it has one; ValueError when they cannot be had."""

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
        if self.captions and not caption:
            raise ValueError(f"{sample.name}: it has no readable caption")
        rng = (
            np.random.default_rng([self.seed, draw.epoch, draw]) if self.crop != "center" else None
        )
        image = fit_image(self.image(sample, draw), self.image_size, self.crop, rng)
        return {"image": image, "caption": caption} if self.captions else {"image": image}


def fit_image(
    image: Image.Image, size: int, crop: Crop = "center", rng: np.random.Generator | None = None
) -> Tensor:
    """RGB image -> uint8 (3, size, size): the shorter edge resized (bicubic, antialiased), then a square cut out.

    Args:
        crop: `center`; `random`: anywhere along the longer edge (paper, Table 7); `zoom`: a square of 80 to 100 % of the
            shorter edge, anywhere. Mirroring is left to the training loop, where it costs nothing.
        rng: for the last two.
    """
    if crop == "center":
        image = resize_and_crop(image, size)
    else:
        assert rng is not None, "a random crop needs a generator"
        scale = rng.uniform(ZOOM, 1) if crop == "zoom" else 1.0
        edge = max(1, round(min(image.size) * scale))
        left, top = (int(rng.integers(extent - edge + 1)) for extent in image.size)
        image = image.resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge)
        )
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
