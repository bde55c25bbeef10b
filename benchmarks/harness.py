"""What every benchmark is made of: alternating timing, peak memory, one table.

A benchmark is a module of this folder with `run() -> list[Row]`. It checks that both ways give the same result before it
times them: a fast wrong answer is no row.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.files import write_json

MIB = 1024**2


@dataclass(frozen=True)
class Row:
    """One case, measured both ways."""

    case: str
    ours: float
    reference: float
    unit: str
    """`s`, `MiB`, `images/s` ..."""
    higher_is_better: bool = False
    """True for rates."""

    @property
    def ratio(self) -> float:
        """Above 1: ours is better."""
        better, worse = (
            (self.ours, self.reference) if self.higher_is_better else (self.reference, self.ours)
        )
        return better / worse if worse else float("inf")


def compare(
    ours: Callable[[], Any], reference: Callable[[], Any], repeats: int = 5
) -> tuple[float, float]:
    """Median seconds of both, run in alternation so that a busy machine disturbs them alike; one run of each warms up."""
    functions = (ours, reference)
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for function, spent in zip(functions, seconds, strict=True):
            begin = time.perf_counter()
            function()
            if repeat > 0:
                spent.append(time.perf_counter() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MiB of resident memory that a function needs at its peak beyond what is there before, in a process of its own.

    Args:
        prepare: called in that process as `prepare(*arguments)`; returns the function to measure, with its inputs made.
            It and the arguments must be picklable.

    Raises:
        OSError: where there is no `/proc/self/clear_refs`; the high-water mark of a process can be reset on Linux only.
    """
    # glibc keeps freed blocks below a growing threshold; with a fixed one they go back, and are seen when they come again.
    variable = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(variable)
    os.environ[variable] = str(64 * 1024)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_of_this_process, prepare, arguments).result()
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _peak_of_this_process(prepare: Callable[..., Callable[[], Any]], arguments: tuple) -> float:
    function = prepare(*arguments)
    function()  # libraries, thread pools and inputs are in memory from here on
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / MIB


def _status(key: str) -> int:
    """Bytes of a memory counter of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def write_table(name: str, rows: Sequence[Row], folder: str | Path = "runs/benchmarks") -> Path:
    """Print the rows and write them to `folder/name.json`; returns its path."""
    width = max(len(row.case) for row in rows)
    print(f"\n{name:<{width}}  {'ours':>12}  {'reference':>12}  {'unit':<8}  {'ratio':>7}")
    for row in rows:
        print(
            f"{row.case:<{width}}  {row.ours:>12.4g}  {row.reference:>12.4g}  {row.unit:<8}  {row.ratio:>6.2f}x"
        )
    keys = ("case", "ours", "reference", "unit", "ratio")
    path = Path(folder) / f"{name}.json"
    write_json(path, {"rows": [{key: getattr(row, key) for key in keys} for row in rows]})
    return path
