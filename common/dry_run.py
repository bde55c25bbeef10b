"""What every training's `dry_run=N` shares: measuring memory, the report.

A dry run takes N steps of the real configuration and keeps nothing. Weights that are not on this machine are random, which
changes no figure here.
"""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from vqrae.common.distributed import world_size
from vqrae.common.memory import GIB
from vqrae.common.run import format_duration

GPUS = 8  # of the machine that memory is estimated for


@dataclass(frozen=True, kw_only=True)
class DryRunReport:
    """What a dry run took, and the run that it rehearses."""

    name: str
    """Of the run or its stage."""
    samples: str
    """What the batches hold: images, sequences …"""
    parts: dict[str, tuple[int, int]]
    """Parameters by name: all, trained."""
    seconds: list[float]
    """Of each step."""
    before_bytes: int
    """What the process held before anything was built."""
    peak_bytes: int
    model_bytes: float
    """Weights, gradients and moments of the dry run itself; the rest of the peak is the micro-batch."""
    gpu_bytes: dict[int, float]
    """Weights, gradients and moments on each of `GPUS` GPUs, by ZeRO stage."""
    micro_batch_size: int
    activation_checkpointing: bool
    max_steps: int
    global_batch_size: int

    @property
    def working_bytes(self) -> float:
        """What a micro-batch takes on top of weights, gradients and moments."""
        return max(0.0, self.peak_bytes - self.before_bytes - self.model_bytes)

    def text(self) -> str:
        """The report for people."""
        batch = self.micro_batch_size * world_size()
        steady = self.seconds[1:] or self.seconds
        per_step = sum(steady) / len(steady)
        total = self.max_steps * self.global_batch_size
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        lines = [
            f"----- dry run of {self.name}: {len(self.seconds)} steps of {batch} {self.samples} -----",
            f"{'parameters':24}{'all':>14}{'trained':>14}",
            *(
                f"  {name:22}{whole:14,}{trained:14,}"
                for name, (whole, trained) in self.parts.items()
            ),
            f"measured on {world_size()} x {device}, micro-batch {self.micro_batch_size}, "
            f"activation checkpointing {'on' if self.activation_checkpointing else 'off'}",
            f"  {'peak memory':22}{self.peak_bytes / GIB:8.2f} GiB per process ({self.before_bytes / GIB:.2f} before)",
            f"  {'seconds per step':22}{per_step:8.2f} (the first {self.seconds[0]:.2f})",
            f"the full run: {self.max_steps:,} steps of {self.global_batch_size:,} = {total:,} {self.samples}",
            f"  {'time at this speed':22}{format_duration(per_step * total / batch):>8}",
            f"memory of each of {GPUS} GPUs: weights, gradients and moments by arithmetic, "
            f"and {self.working_bytes / GIB:.1f} GiB that the micro-batch took here",
            *(
                f"  {f'zero={zero}':22}{(state + self.working_bytes) / GIB:8.1f} GiB"
                for zero, state in self.gpu_bytes.items()
            ),
        ]
        return "\n".join(lines)


def is_here(model: str) -> bool:
    """Whether a model can be read without a download: its folder exists, or the hub's cache holds it."""
    return Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "config.json"), str)


def held_bytes() -> int:
    """What this process holds now: on CUDA the tensors, else everything."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0


def peak_bytes() -> int:
    """The most that this process has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
