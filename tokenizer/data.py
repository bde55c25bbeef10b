"""What one stage of a training learns from, as a function of step and process alone.

Shapes: B micro-batch, H W pixels.
"""

from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vqrae.common.distributed import worker_options
from vqrae.data.samples import FileSplit
from vqrae.data.sources import open_images, source_kind
from vqrae.data.stream import Draw, StreamSampler, parse_mixture
from vqrae.tokenizer.config import DataConfig, StageConfig


class StageImages:
    """Training images of one process, and the few that are looked at.

    Args:
        size: pixels of a side.
        seed: of the run: which scenes there are, random crops, the order of a mixture.
        number: of the stage, whose order and augmentation are its own.
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
        self.config, self.stage, self.seed, self.device = config, stage, seed + number, device
        self.rank, self.world_size = rank, world_size
        train, validation = splits(config)
        options: dict[str, Any] = {
            "image_size": size,
            "min_edge": config.min_edge,
            "max_aspect": config.max_aspect,
        }
        crop: dict[str, Any] = {"crop": config.crop, "draft": config.draft}
        self.dataset: Any = open_images(config.train, split=train, seed=seed, **crop, **options)
        self.validation: Any = open_images(
            config.validation or config.train, split=validation, **options
        )

    def micro_batches(self, start: int) -> Iterator[Tensor]:
        """Images (B, 3, H, W) in [0, 1], mirrored and mixed as configured, from optimizer step `start` on, without end."""
        position = start * self.stage.global_batch_size + self.rank
        options: dict[str, Any] = {"seed": self.seed, "start": position, "stride": self.world_size}
        places = PlaceSampler(self.dataset, pairs=self.config.cutmix > 0, **options)
        samples = AugmentedImages(self.dataset, self.config, self.seed)
        loader = DataLoader(
            samples,
            self.stage.micro_batch_size,
            sampler=places,
            **worker_options(self.config.num_workers),
            pin_memory=self.device.type
            == "cuda",  # only from there can a copy run beside the computation
        )
        for batch in loader:
            yield batch.to(self.device, non_blocking=True).float() / 255

    def some(self, count: int) -> Tensor:
        """Up to `count` training images (M, 3, H, W) in [0, 1], without augmentation, drawn from all of the data."""
        return self._load(self.dataset, count, self.seed)

    def previews(self, count: int = 12) -> Tensor:
        """Up to `count` validation images (M, 3, H, W) in [0, 1]; the same for every seed and stage."""
        return self._load(self.validation, count, 0)

    def _load(self, dataset: Any, count: int, seed: int) -> Tensor:
        draws = list(islice(StreamSampler(dataset, seed=seed), min(count, len(dataset))))
        loader = DataLoader(
            dataset, batch_size=64, sampler=draws, **worker_options(self.config.num_workers)
        )
        return torch.cat([batch["image"] for batch in loader]).to(self.device).float() / 255


def splits(config: DataConfig) -> tuple[FileSplit, FileSplit]:
    """The splits to train and to look at: where validation has a source of its own, both are used whole."""
    if config.validation is None:
        return "train", "validation"
    return (
        "train" if is_endless(config.train) else "all",
        "validation" if is_endless(config.validation) else "all",
    )


def is_endless(source: str) -> bool:
    """Whether a source, or part of a mixture, is scenes: they are no files that could be used whole."""
    kind = source_kind(source)
    return kind == "scenes" or (
        kind == "mixture" and any(is_endless(name) for name, _ in parse_mixture(source))
    )


class Place(NamedTuple):
    """A place in the stream of samples that all processes share.

    Attributes:
        position: its number since the stage began, from which all randomness of augmentation follows.
        own: the sample there.
        next: the sample behind it, None where nobody asks.
    """

    position: int
    own: Draw
    next: Draw | None


class PlaceSampler(Sampler[Place]):
    """Every `stride`-th place of the stream of `StreamSampler`, from position `start` on, without end.

    Args:
        pairs: name the next of each place; it costs a second permutation of the data.
    """

    def __init__(self, data: Any, *, seed: int, start: int, stride: int, pairs: bool) -> None:
        self.start, self.stride = start, stride
        own, following = (
            StreamSampler(data, seed=seed, world_size=stride, start=start + shift)
            for shift in (0, 1)
        )
        self.own, self.next = own, following if pairs else repeat(None)

    def __iter__(self) -> Iterator[Place]:
        for step, (own, following) in enumerate(zip(self.own, self.next, strict=False)):
            yield Place(self.start + step * self.stride, own, following)


class AugmentedImages(Dataset):
    """Images uint8 (3, H, W) by place, a share of them mixed with their next and mirrored.

    Everything depends on the position in the stream alone: neither micro-batch, processes nor loader workers matter.
    """

    def __init__(self, images: Any, config: DataConfig, seed: int) -> None:
        self.images, self.config, self.seed = images, config, seed
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def __getitem__(self, place: Place) -> Tensor:
        image = self._image(place.own)
        generator = torch.Generator().manual_seed(hash((self.seed, place.position)))
        if place.next is not None and torch.rand((), generator=generator) < self.config.cutmix:
            image = cutmix(image, self._image(place.next), generator)
        if self.config.random_flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return image

    def _image(self, draw: Draw) -> Tensor:
        """The image of a draw; the newest is kept, as in one process the next of a place is the own of the following."""
        key = (int(draw), draw.epoch)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.images[draw]["image"]
        return self._kept[1]


def cutmix(image: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """An image (3, H, W) with a rectangle of another one (CutMix, arXiv 1905.04899).

    Sides and corners of the rectangle lie on eighths of a side, so that few patches hold parts of both.
    """
    inside = torch.tensor(True)
    for length in image.shape[1:]:
        extent = torch.randint(2, 7, (), generator=generator)
        begin = (torch.rand((), generator=generator) * (9 - extent)).long()
        cell = torch.arange(length) * 8 // length
        inside = inside[..., None] & (begin <= cell) & (cell < begin + extent)
    return torch.where(inside, other, image)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size): bicubic with antialiasing; as they are where the size is right."""
    if images.shape[-1] == size:
        return images
    return nn.functional.interpolate(
        images, size=(size, size), mode="bicubic", antialias=True
    ).clamp(0, 1)
