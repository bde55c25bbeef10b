"""The endless order of training samples, as a function of step and process alone, so that a resume is exact."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StreamSampler(Sampler[int]):
    """Indices of a map-style data set, epoch after epoch, each epoch a seeded permutation.

    Process r of w takes every w-th index, so the union over processes is what one process would see.

    Args:
        size: samples of the data set.
        start: global samples that were already consumed.
    """

    def __init__(self, size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        if size < 1:
            raise ValueError("the data set is empty")
        self.size, self.seed, self.rank, self.world_size, self.start = size, seed, rank, world_size, start

    def __iter__(self) -> Iterator[int]:
        position = self.start + self.rank
        epoch, order = -1, torch.empty(0)
        while True:
            if position // self.size != epoch:
                epoch = position // self.size
                order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            yield int(order[position % self.size])
            position += self.world_size
