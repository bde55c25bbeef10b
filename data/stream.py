"""The endless order of training samples, as a function of step and process alone, so that a resume is exact."""

from collections.abc import Iterator, Sized

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
    change nothing. A data set that says `is_shuffled` (a mixture, tars with a buffer) orders itself: it is read from the front.

    Args:
        data: the data set; only its length counts.
        start: global samples that were already consumed.
    """

    def __init__(self, data: Sized, *, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        self.size, self.shuffle = len(data), not getattr(data, "is_shuffled", False)
        if self.size < 1:
            raise ValueError("the data set is empty")
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start

    def __iter__(self) -> Iterator[Draw]:
        position = self.start + self.rank
        epoch, order = -1, torch.empty(0)
        while True:
            if self.shuffle and position // self.size != epoch:
                epoch = position // self.size
                order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            place = position % self.size
            yield Draw(int(order[place]) if self.shuffle else place, position // self.size)
            position += self.world_size
