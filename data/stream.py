"""The endless order of training samples, as a function of step and process alone, so that a resume is exact."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler


class Draw(int):
    """An index that knows which time round it is asked for.

    It travels to loader workers, which `set_epoch` in the parent process cannot reach: random crops stay a function of
    (seed, epoch, index), whoever decodes.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "Draw":
        draw = super().__new__(cls, index)
        draw.epoch = epoch
        return draw

    def __reduce__(self) -> tuple[type["Draw"], tuple[int, int]]:
        return Draw, (int(self), self.epoch)


class StreamSampler(Sampler[int]):
    """Indices of a map-style data set, epoch after epoch, each epoch a seeded permutation.

    Process r of w takes every w-th index, so the union over processes is what one process would see, and loader workers
    change nothing. A data set that has a `training_index`, (place, epoch) -> index, orders itself (a mixture, tars with a
    buffer).

    Args:
        data: the data set; only its length counts.
        start: global samples that were already consumed.
    """

    def __init__(
        self, data: Sized, *, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.size, self.own_order = len(data), getattr(data, "training_index", None)
        if self.size < 1:
            raise ValueError("the data set is empty")
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start

    def __iter__(self) -> Iterator[Draw]:
        position = self.start + self.rank
        epoch, order = -1, torch.empty(0)
        while True:
            if not self.own_order and position // self.size != epoch:
                epoch = position // self.size
                order = torch.randperm(
                    self.size,
                    generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch),
                )
            turn, place = divmod(position, self.size)
            yield Draw(self.own_order(place, turn) if self.own_order else int(order[place]), turn)
            position += self.world_size


class OwnOrderSampler(Sampler[int]):
    """The indices of an epoch of a data set that orders itself."""

    def __init__(self, data: Any) -> None:
        self.data, self.epoch = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for place in range(len(self.data)):
            yield Draw(self.data.training_index(place, self.epoch), self.epoch)
