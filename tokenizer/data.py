"""The images of one training stage, as a function of step and process alone.

Shapes: B micro-batch, H W pixels, M images of a sample.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vqrae.common.distributed import worker_options
from vqrae.data.samples import FileSplit
from vqrae.data.sources import open_images, source_kind
from vqrae.data.stream import Draw, StreamSampler, parse_mixture
from vqrae.tokenizer.config import DataConfig, StageConfig


class StageImages:
    """Training images of one process, and a few of validation.

    Args:
        size: pixels of a side.
        seed: of the run: which scenes there are, random crops, the order of a mixture.
        number: of the stage, which has its own order and augmentation.
        rank, world_size: this process among all.
        device: where images go.
    """

    def __init__(
        self,
        config: DataConfig,
        stage: StageConfig,
        *,
        size: int,
        seed: int,
        number: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.stage = config, stage
        self.rank, self.world_size = rank, world_size
        self.seed = seed + number
        self.device = device
        self.workers = worker_options(config.num_workers)
        # A validation source of its own leaves all of both sources to their use.
        train: FileSplit = "train"
        validation: FileSplit = "validation"
        if config.validation is not None:
            train = "train" if is_endless(config.train) else "all"
            validation = "validation" if is_endless(config.validation) else "all"
        common: dict[str, Any] = {
            "image_size": size,
            "min_edge": config.min_edge,
            "max_aspect": config.max_aspect,
        }
        crop: dict[str, Any] = {"crop": config.crop, "draft": config.draft}
        self.training: Any = open_images(config.train, split=train, seed=seed, **crop, **common)
        source = config.validation or config.train
        self.validation: Any = open_images(source, split=validation, **common)

    def micro_batches(self, start: int) -> Iterator[Tensor]:
        """Augmented images (B, 3, H, W) in [0, 1] from optimizer step `start` on, without end."""
        first = start * self.stage.global_batch_size + self.rank
        loader = DataLoader(
            AugmentedImages(self.training, self.config, self.seed),
            self.stage.micro_batch_size,
            sampler=self._places(first),
            # Only from pinned memory can a copy run alongside the computation.
            pin_memory=self.device.type == "cuda",
            **self.workers,
        )
        for batch in loader:
            yield batch.to(self.device, non_blocking=True).float() / 255

    def sample(self, number: int) -> Tensor:
        """Up to `number` images (M, 3, H, W) in [0, 1] from all of the data, not augmented."""
        return self._load(self.training, number, self.seed)

    def previews(self, number: int = 12) -> Tensor:
        """Up to `number` images (M, 3, H, W) in [0, 1] of validation, equal in every stage."""
        return self._load(self.validation, number, 0)

    def _places(self, first: int) -> Iterable["Place"]:
        """Every `world_size`-th place of the stream that all processes share."""
        stride = self.world_size
        own = StreamSampler(self.training, seed=self.seed, world_size=stride, start=first)
        following: Iterable[Draw | None] = repeat(None)
        if self.config.cutmix:  # else a second permutation would be built for nothing
            following = StreamSampler(
                self.training, seed=self.seed, world_size=stride, start=first + 1
            )
        return map(Place, count(first, stride), own, following)

    def _load(self, dataset: Any, number: int, seed: int) -> Tensor:
        draws = list(islice(StreamSampler(dataset, seed=seed), min(number, len(dataset))))
        loader = DataLoader(dataset, batch_size=64, sampler=draws, **self.workers)
        return torch.cat([batch["image"] for batch in loader]).to(self.device).float() / 255


def is_endless(source: str) -> bool:
    """Whether a source is scenes, or a mixture with scenes, which cannot be used as a whole."""
    kind = source_kind(source)
    if kind == "mixture":
        return any(is_endless(part) for part, _ in parse_mixture(source))
    return kind == "scenes"


class Place(NamedTuple):
    """A place in the stream of training samples."""

    position: int
    """Samples of the stage before it, on all processes; augmentation depends on it alone."""
    own: Draw
    following: Draw | None
    """The sample of the next place, which CutMix takes a rectangle from."""


class AugmentedImages(Dataset):
    """Images uint8 (3, H, W) by place, some mixed with the following one and mirrored.

    They depend on the position alone, not on micro-batch, processes or loader workers.
    """

    def __init__(self, images: Any, config: DataConfig, seed: int) -> None:
        self.images, self.config = images, config
        self.seed = seed
        self._newest: tuple[tuple[int, int], Tensor] | None = None

    def __getitem__(self, place: Place) -> Tensor:
        image = self._image(place.own)
        generator = torch.Generator().manual_seed(hash((self.seed, place.position)))
        if place.following is not None and torch.rand((), generator=generator) < self.config.cutmix:
            image = cutmix(image, self._image(place.following), generator)
        if self.config.random_flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return image

    def _image(self, draw: Draw) -> Tensor:
        # In one process the following image of a place is the own image of the next: read once.
        key = (int(draw), draw.epoch)
        if self._newest is None or self._newest[0] != key:
            self._newest = key, self.images[draw]["image"]
        return self._newest[1]


def cutmix(image: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """An image (3, H, W) with a rectangle of another one (CutMix, arXiv 1905.04899).

    Its edges are multiples of an eighth of the side, so that few patches show parts of both.
    """
    inside = torch.tensor(True)
    for length in image.shape[1:]:
        extent = torch.randint(2, 7, (), generator=generator)
        begin = (torch.rand((), generator=generator) * (9 - extent)).long()
        cell = torch.arange(length) * 8 // length
        inside = inside[..., None] & (begin <= cell) & (cell < begin + extent)
    return torch.where(inside, other, image)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size), bicubic with antialiasing."""
    if images.shape[-1] == size:
        return images
    shape = (size, size)
    return nn.functional.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
