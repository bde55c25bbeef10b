"""The images of an evaluation: which part of a source, resized as the protocol says, broken ones left out and counted."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from vqrae.common.distributed import sum_over_processes
from vqrae.common.images import image_to_uint8, open_image
from vqrae.data.image_files import ImageFolder
from vqrae.data.samples import (
    BROKEN_SHARE,
    BROKEN_WINDOW,
    FileSplit,
    TolerantDataset,
    TooManyBrokenSamples,
)
from vqrae.data.sources import Samples, open_images, source_kind
from vqrae.data.stream import Draw
from vqrae.eval.reconstruction.protocols import Protocol, resize_image
from vqrae.eval.results.paper_tables import IMAGENET_VALIDATION
from vqrae.eval.sharding import share

SplitChoice = Literal["auto", "validation", "all"]
USERS_KINDS = ("folder", "jsonl", "tar", "hf")


class ProtocolFolder(ImageFolder):
    """Images of a folder, resized as a protocol says."""

    def __init__(
        self,
        folder: str,
        *,
        image_size: int,
        split: FileSplit,
        size: int | None,
        protocol: Protocol,
    ) -> None:
        super().__init__(folder, image_size=image_size, size=size, split=split)
        self.protocol = protocol

    def read(self, index: int) -> dict[str, Any]:
        image = resize_image(open_image(self.paths[index]), self.image_size, self.protocol.resize)
        return {"image": image_to_uint8(image)}


def resolve_split(source: str, choice: SplitChoice) -> FileSplit:
    """`auto` takes all that a user's files hold, and the held-out part of the embedded data sets."""
    if choice != "auto":
        return choice
    return "all" if source_kind(source) in USERS_KINDS else "validation"


def open_evaluation(
    source: str,
    *,
    image_size: int,
    split: FileSplit = "all",
    size: int | None = None,
    protocol: Protocol | None = None,
) -> Samples:
    """Images of a source -> map-style data set of {"image": uint8 (3, H, W)}.

    Raises:
        ValueError: when the source cannot be resized as the protocol wants: only folders keep their images' own size.
    """
    protocol = protocol or Protocol()
    kind = source_kind(source)
    if kind == "folder":
        return ProtocolFolder(
            source, image_size=image_size, split=split, size=size, protocol=protocol
        )
    if kind != "scenes" and protocol.resize != Protocol.resize:  # scenes are drawn at their size
        raise ValueError(
            f"{source} is resized by {Protocol.resize} when it is read, but this protocol wants {protocol.resize}: "
            "unpack it into a folder"
        )
    return open_images(source, image_size=image_size, size=size, split=split)


def is_imagenet_validation(dataset: object) -> bool:
    """Whether a data set is ImageNet's 50,000 validation images, whose names number them."""
    if not isinstance(dataset, ImageFolder) or len(dataset) != IMAGENET_VALIDATION:
        return False
    expected = {f"ILSVRC2012_val_{i:08d}" for i in range(1, IMAGENET_VALIDATION + 1)}
    return {path.stem for path in dataset.paths} == expected


class _Readable(Dataset):
    """Samples, or None for a broken one: training puts the next in its place, an evaluation must not count that twice."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            if isinstance(self.dataset, TolerantDataset):
                return self.dataset.read(Draw(index, 0))["image"]
            return self.dataset[index]["image"]
        except ValueError as error:
            return str(error)


class ImageBatches:
    """This process's share of the first `total` images of a data set, as batches (B, 3, H, W) in [0, 1].

    Args:
        progress: called with (images done, images in all) of this process.

    Attributes:
        broken: how many could not be read; after `reduce`, of all processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        total: int,
        *,
        batch_size: int,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.indices, self.device, self.progress = share(total), device, progress
        self.broken = torch.zeros(1, dtype=torch.int64, device=device)
        self.loader = DataLoader(
            Subset(_Readable(dataset), self.indices),
            batch_size,
            num_workers=num_workers,
            collate_fn=list,
        )

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for samples in self.loader:
            images = [sample for sample in samples if isinstance(sample, Tensor)]
            for message in (sample for sample in samples if isinstance(sample, str)):
                self._note(message, done + len(samples))
            done += len(samples)
            if images:
                yield torch.stack(images).to(self.device, non_blocking=True).float() / 255
            if self.progress is not None:
                self.progress(done, len(self.indices))

    def _note(self, message: str, seen: int) -> None:
        print(f"left out a broken image: {message}", flush=True)
        self.broken += 1
        if self.broken > BROKEN_SHARE * max(seen, BROKEN_WINDOW):
            raise TooManyBrokenSamples(
                f"{int(self.broken)} of {seen} images are broken, the last: {message}"
            )

    def reduce(self) -> None:
        """Count the broken images of all processes."""
        sum_over_processes(self.broken)
