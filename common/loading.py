"""What every `DataLoader` of a job shares: workers that die without a word are noticed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STALL_SECONDS = (
    600  # no sample takes that long; a worker that cannot hand over its batch never will
)


def worker_options(num_workers: int) -> dict[str, Any]:
    """`DataLoader` arguments for this many workers."""
    return {"num_workers": num_workers, "timeout": STALL_SECONDS if num_workers else 0}


@contextmanager
def stalls_explained() -> Iterator[None]:
    """Say what to do where a loader in the block waited in vain for its workers.

    Raises:
        ValueError: in place of the loader's own error.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if "DataLoader timed out" not in message and "DataLoader worker" not in message:
            raise
        raise ValueError(
            f"the workers that load data gave nothing more ({message.splitlines()[0]}): mostly /dev/shm is full (df -h "
            "/dev/shm; in docker --shm-size=16g). Make room, or set num_workers or dataloader_num_workers to 0"
        ) from error
