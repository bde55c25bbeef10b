"""Evaluations on several processes: each scores a share, and all get the results of all."""

import itertools
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

from vqrae.common.cli import progress_line
from vqrae.common.distributed import choose_device, is_main_process, world_size

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=1)  # a resumed run may find all that is left in one process's share
_NOTHING = object()  # not None, which may be an item


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the launch's processes for the length of a block; yields this process's device."""
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
        dist.barrier()  # a process that leaves early takes the others' connections with it
    finally:
        dist.destroy_process_group()


def run_module(module: ModuleType, arguments: list[str], nproc: int) -> None:
    """Run a command of ours in this process, or in several others, whose failure is an error here.

    Raises ValueError when this process is one of several already.
    """
    if world_size() > 1:
        raise ValueError(
            f"got a launch of {world_size()} processes, expected one that starts others: "
            "give nproc= as a key"
        )
    if nproc == 1:
        module.main(arguments)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    subprocess.run([sys.executable, *launcher, "-m", module.__name__, *arguments], check=True)


def progress_of_main(label: str) -> Callable[[int, int], None]:
    """A progress line of the main process; the others, which are about as far, print nothing."""
    return progress_line(label) if is_main_process() else lambda done, total: None


def stride(items: Sequence[T]) -> Sequence[T]:
    """This process's share of the items: every n-th, none where there are more processes."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def batch_indices(total: int, batch_size: int) -> Sequence[list[int]]:
    """This process's batches of the indices 0 … total - 1.

    Whole batches are shared out, so that rounding does not depend on the number of processes.
    """
    starts = range(0, total, batch_size)
    return stride([list(range(start, min(start + batch_size, total))) for start in starts])


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes on every one of them.

    With one item for each that `stride` gave out, they come in the order of the whole.
    """
    if not dist.is_initialized():
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    rounds = itertools.zip_longest(*parts, fillvalue=_NOTHING)
    return [item for item in itertools.chain.from_iterable(rounds) if item is not _NOTHING]


def map_shared(function: Callable[[T], R], items: Sequence[T], label: str) -> list[R]:
    """The function of each item, in order; processes share the work, and all get all results."""
    mine, progress = stride(items), progress_of_main(label)
    results: list[R] = []
    for done, item in enumerate(mine, start=1):
        results.append(function(item))
        progress(done, len(mine))
    return gather(results)
