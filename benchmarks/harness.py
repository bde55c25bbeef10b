"""What a benchmark is made of: rows of alternating timings and of peak memory.

A benchmark is a module with `run() -> list[Row]`. It first asserts that both ways give the same: a
fast wrong answer is not a row.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

MIB = 1024**2
Work = Callable[[], Any]


class Row(NamedTuple):
    """One case, measured both ways; a ratio above 1 means that ours is better."""

    case: str
    ours: float
    reference: float
    unit: str
    ratio: float


def time_row(
    case: str,
    ours: Work,
    reference: Work,
    *,
    repeats: int,
    work: float | None = None,
    unit: str = "s",
) -> Row:
    """Median times of both, in alternation, so that a busy machine disturbs them alike.

    One run of each warms up. `work` is done by one call, in the unit of a rate; without it the row
    holds seconds.
    """
    seconds: dict[Work, list[float]] = {ours: [], reference: []}
    for repeat in range(repeats + 1):
        for function, spent in seconds.items():
            begin = time.perf_counter()
            function()
            if repeat > 0:
                spent.append(time.perf_counter() - begin)
    fast, slow = statistics.median(seconds[ours]), statistics.median(seconds[reference])
    if work is None:
        return Row(case, fast, slow, unit, slow / fast)
    return Row(case, work / fast, work / slow, unit, slow / fast)


def memory_row(
    case: str, prepare: Callable[..., Work], ours: Sequence[Any], reference: Sequence[Any]
) -> Row:
    """Peak memory of `prepare(*ours)()` and of `prepare(*reference)()`, see `peak_memory`."""
    small, large = peak_memory(prepare, *ours), peak_memory(prepare, *reference)
    return Row(case, small, large, "MiB", large / small if small else float("inf"))


def peak_memory(prepare: Callable[..., Work], *arguments: Any) -> float:
    """MiB that `prepare(*arguments)()` needs on top of its inputs, in a process of its own (Linux
    only).
    """
    # glibc keeps freed blocks below a growing threshold; with a fixed one they are returned, and
    # seen when they come again.
    fixed = mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(64 * 1024))
    spawn = multiprocessing.get_context("spawn")
    with fixed, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak_of_this_process, prepare, arguments).result()


def _peak_of_this_process(prepare: Callable[..., Work], arguments: Sequence[Any]) -> float:
    function = prepare(*arguments)
    function()  # libraries, thread pools and inputs are in memory from here on
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / MIB


def _status(key: str) -> int:
    """Bytes of a memory counter of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def print_table(name: str, rows: Sequence[Row]) -> None:
    """The rows for people."""
    width = max(len(row.case) for row in rows)
    print(f"\n{name:<{width}}  {'ours':>12}  {'reference':>12}  {'unit':<8}  {'ratio':>7}")
    for row in rows:
        numbers = f"{row.ours:>12.4g}  {row.reference:>12.4g}  {row.unit:<8}  {row.ratio:>6.2f}x"
        print(f"{row.case:<{width}}  {numbers}")
