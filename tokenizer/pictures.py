"""What one stage of a training learns from, as a function of step and process alone.

Shapes: B micro-batch, H W pixels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vqrae.data.sources import open_images
from vqrae.data.stream import StreamSampler
from vqrae.tokenizer.train_config import DataConfig, StageConfig


class StagePictures:
    """Training pictures of one process, and the few that are looked at.

    Args:
        size: pixels of a side.
        seed: of order and augmentation.
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
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.stage, self.seed, self.rank, self.device = config, stage, seed, rank, device
        self.dataset: Any = open_images(config.train, image_size=size, crop=config.crop)
        self.validation: Any = open_images(config.validation or config.train, image_size=size, split="validation")
        self.sampler = StreamSampler(self.dataset, seed=seed, rank=rank, world_size=world_size)

    def micro_batches(self, start: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W) from optimizer step `start` on, without end."""
        self.sampler.start = start * self.stage.global_batch_size
        size, workers = self.stage.micro_batch_size, self.config.num_workers
        for batch in DataLoader(self.dataset, size, sampler=self.sampler, num_workers=workers):
            yield batch["image"]

    def augment(self, batch: Tensor, step: int, micro: int) -> Tensor:
        """uint8 (B, 3, H, W) -> images in [0, 1], mirrored and mixed as configured."""
        images = batch.to(self.device, non_blocking=True).float() / 255
        generator = torch.Generator().manual_seed(hash((self.seed, step, micro, self.rank)))
        if self.config.random_flip:
            flips = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(flips.to(self.device)[:, None, None, None], images.flip(-1), images)
        return cutmix(images, self.config.cutmix, generator) if self.config.cutmix else images

    def first(self, count: int) -> Tensor:
        """The first training pictures as images (count, 3, H, W) in [0, 1]: what statistics and codebook start from."""
        return self._stack(self.dataset, count)

    def previews(self, count: int = 12) -> Tensor:
        """The first validation pictures as images (count, 3, H, W) in [0, 1]."""
        return self._stack(self.validation, count)

    def _stack(self, dataset: Dataset, count: int) -> Tensor:
        samples = [dataset[i]["image"] for i in range(min(count, len(dataset)))]  # type: ignore[arg-type]
        return torch.stack(samples).to(self.device).float() / 255


def cutmix(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W), a share of which show a rectangle of their neighbour in the batch (CutMix, arXiv 1905.04899).

    Sides and corners of the rectangles lie on eighths of a side, so that few patches hold parts of both.
    """
    batch, _, height, width = images.shape
    inside = torch.rand(batch, generator=generator)[:, None, None] < share
    for axis, length in ((1, height), (2, width)):
        extent = torch.randint(2, 7, (batch, 1), generator=generator)
        begin = (torch.rand(batch, 1, generator=generator) * (9 - extent)).long()
        cell = torch.arange(length)[None] * 8 // length
        inside = inside & ((begin <= cell) & (cell < begin + extent)).unsqueeze(3 - axis)
    return torch.where(inside[:, None].to(images.device), images.roll(1, 0), images)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size): bicubic with antialiasing; as they are where the size is right."""
    if images.shape[-1] == size:
        return images
    return nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
