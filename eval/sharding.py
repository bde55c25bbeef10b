"""An evaluation on several processes: each scores a share of the pictures, and sums are added at the end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae.common.distributed import world_size

T = TypeVar("T")


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the launch's processes for the length of a block; yields this process's device."""
    if world_size() == 1:
        yield device
        return
    on_cuda = device.startswith("cuda")
    dist.init_process_group("nccl" if on_cuda else "gloo")
    if on_cuda:
        device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def share(total: int) -> range:
    """Indices of this process's pictures: consecutive, all of them together 0 … total - 1, sizes differ by one at most.

    Raises:
        ValueError: on every process, when there are more of them than pictures.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if total < size:
        raise ValueError(f"got {total} pictures for {size} processes, expected at least one for each: set nproc={total}")
    return range(rank * total // size, (rank + 1) * total // size)


def stride(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items: every n-th, also when there are fewer than processes; alone, all."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def sum_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes; alone, nothing happens."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes on every one of them, in rank order; alone, the items."""
    if not dist.is_initialized():
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
