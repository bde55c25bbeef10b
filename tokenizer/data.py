"""The images of one training stage, as a function of step and process alone.

Shapes: B micro-batch, H W pixels, T tokens of a caption, M images of a sample.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from vqrae.common.distributed import worker_options
from vqrae.data.samples import FileSplit
from vqrae.data.sources import open_captioned, open_images, source_kind
from vqrae.data.stream import Draw, StreamSampler, parse_mixture
from vqrae.tokenizer.augment import NUM_RANDOM, NUM_VIEWS
from vqrae.tokenizer.config import DataConfig, StageConfig


class Batch(NamedTuple):
    """A micro-batch."""

    images: Tensor
    """(B, 3, H, W) in [0, 1], augmented."""
    random: Tensor
    """(B, views, numbers) in [0, 1) on the CPU: how the discriminator sees each image."""
    captioned: Tensor
    """(B,) bool: whether there is a caption that is true of the image."""
    tokens: dict[str, Tensor]
    """`input_ids` and `attention_mask` (B, T) of the captions; empty without a text tokenizer."""


class StageImages:
    """Training images of one process, and a few of validation.

    Args:
        text_tokenizer: of captions; None: images alone.
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
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        size: int,
        seed: int,
        number: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.stage = config, stage
        self.text_tokenizer = text_tokenizer
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
        open_training = open_images if text_tokenizer is None else open_captioned
        self.training: Any = open_training(config.train, split=train, seed=seed, **crop, **common)
        source = config.validation or config.train
        self.validation: Any = open_images(source, split=validation, **common)

    def micro_batches(self, start: int) -> Iterator[Batch]:
        """Micro-batches from optimizer step `start` on, without end."""
        first = start * self.stage.global_batch_size + self.rank
        loader = DataLoader(
            AugmentedImages(self.training, self.config, self.seed),
            self.stage.micro_batch_size,
            sampler=self._places(first),
            collate_fn=Collator(self.text_tokenizer),
            # Only from pinned memory can a copy run alongside the computation.
            pin_memory=self.device.type == "cuda",
            **self.workers,
        )
        for batch in loader:
            images = batch.images.to(self.device, non_blocking=True).float() / 255
            captioned = batch.captioned.to(self.device, non_blocking=True)
            tokens = {key: ids.to(self.device) for key, ids in batch.tokens.items()}
            yield Batch(images, batch.random, captioned, tokens)

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
    """{image: uint8 (3, H, W), caption, random} by place, some mixed with the following image and
    mirrored.

    They depend on the position alone, not on micro-batch, processes or loader workers.
    """

    def __init__(self, images: Any, config: DataConfig, seed: int) -> None:
        self.images, self.config = images, config
        self.seed = seed
        self._newest: tuple[tuple[int, int], dict[str, Any]] | None = None

    def __getitem__(self, place: Place) -> dict[str, Any]:
        sample = self._sample(place.own)
        image, caption = sample["image"], sample.get("caption", "")
        generator = torch.Generator().manual_seed(hash((self.seed, place.position)))
        if place.following is not None and torch.rand((), generator=generator) < self.config.cutmix:
            image = cutmix(image, self._sample(place.following)["image"], generator)
            caption = ""  # no longer true
        if self.config.random_flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        random = torch.rand(NUM_VIEWS, NUM_RANDOM, generator=generator)
        return {"image": image, "caption": caption, "random": random}

    def _sample(self, draw: Draw) -> dict[str, Any]:
        # In one process the following image of a place is the own image of the next: read once.
        key = (int(draw), draw.epoch)
        if self._newest is None or self._newest[0] != key:
            self._newest = key, self.images[draw]
        return self._newest[1]


class Collator:
    """Samples of `AugmentedImages` -> a `Batch` on the CPU, its images uint8."""

    def __init__(self, text_tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.text_tokenizer = text_tokenizer

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        captions = [sample["caption"] for sample in samples]
        tokens = {}
        if self.text_tokenizer is not None:
            options = {"padding": True, "truncation": True, "return_tensors": "pt"}
            encoded = self.text_tokenizer(captions, **options)
            tokens = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        images = torch.stack([sample["image"] for sample in samples])
        random = torch.stack([sample["random"] for sample in samples])
        captioned = torch.tensor(list(map(bool, captions)))
        return Batch(images, random, captioned, tokens)


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
