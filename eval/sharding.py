"""An evaluation on several processes: each scores a share, and the results are put together at the end."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae.common.cli import progress_line
from vqrae.common.distributed import choose_device, is_main_process, world_size

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # a resumed run may find all that is left in one process's share


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the launch's processes for the length of a block; yields this process's device.

    Args:
        device: cpu, cuda, …; auto takes CUDA when there is one.
    """
    device = choose_device(device)
    if world_size() == 1:
        yield device
        return
    on_cuda = device.startswith("cuda")
    if on_cuda:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    own = torch.device(device) if on_cuda else None  # else NCCL guesses it
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=PATIENCE, device_id=own)
    try:
        yield device
        dist.barrier()  # who leaves early takes the connections of the others along
    finally:
        dist.destroy_process_group()


def run_module(module: ModuleType, arguments: list[str], nproc: int) -> None:
    """Run a command of ours in this process, or in several others.

    Raises:
        ValueError: when this process is one of several already.
        subprocess.CalledProcessError: when one of the others fails.
    """
    if world_size() > 1:
        raise ValueError(
            f"got a launch of {world_size()} processes, expected one that starts others: give nproc= as a key"
        )
    if nproc == 1:
        module.main(arguments)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    subprocess.run([sys.executable, *launcher, "-m", module.__name__, *arguments], check=True)


def progress_of_main(label: str) -> Callable[[int, int], None] | None:
    """A progress line of the main process, which stands for all."""
    return progress_line(label) if is_main_process() else None


def share(total: int) -> range:
    """Indices of this process's images: consecutive, all of them together 0 … total - 1, sizes differ by one at most.

    Raises:
        ValueError: on every process, when there are more of them than images.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if total < size:
        raise ValueError(
            f"got {total} images for {size} processes, expected at least one for each: set nproc={total}"
        )
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
    return [item for part in _parts(items) for item in part]


def gather_strided(items: list[T]) -> list[T]:
    """One item for each of those that `stride` gave out, in their order, on every process."""
    parts = _parts(items)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


def _parts(items: list[T]) -> list[list[T]]:
    if not dist.is_initialized():
        return [items]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return parts
