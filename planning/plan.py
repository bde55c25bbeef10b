"""`vqrae plan CONFIG`: what a training takes of each GPU, by number of GPUs and ZeRO stage.

Its own `dry_run` takes two steps on a fake GPU, which counts memory and FLOPs. Nothing is
downloaded or computed, and ZeRO, which divides weights, gradients and optimizer states, is
arithmetic.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from vqrae.common import trainer
from vqrae.common.config import (
    ConfigError,
    did_you_mean,
    load_config,
    shipped_config,
    shipped_names,
)
from vqrae.common.dry_run import GIB, Report
from vqrae.common.files import markdown_table
from vqrae.generation import dry_run as generation
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.train import train
from vqrae.mllm import dry_run as mllm
from vqrae.mllm.config import MLLMConfig
from vqrae.mllm.train import train as train_mllm
from vqrae.planning.fake_gpu import fake_gpu
from vqrae.tokenizer import dry_run as tokenizer
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.train import train_stage
from vqrae.understanding import build
from vqrae.understanding import dry_run as understanding
from vqrae.understanding.train import TrainConfig, run_stage

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, communication and fragmentation
STEPS = 2  # the second has optimizer states while it holds activations
HOST_LIMIT = 2**20  # elements; larger tensors of the host are weights, and have no content
READERS: dict[str, type] = {
    "tokenizer": TokenizerTrainConfig,
    "understanding": TrainConfig,
    "generation": GeneratorConfig,
    "mllm": MLLMConfig,
}


def plan(name: str, overrides: Sequence[str] = ()) -> list[tuple[Report, float]]:
    """The trainings of a configuration, each with the FLOPs of one micro-batch.

    `name` is a shipped YAML such as `vicuna_7b`, `tokenizer/tiny` where several packages have it,
    or a file of one's own. Raises ConfigError for one that is not known, not unique or not read by
    any training; ValueError for a run or model whose shapes cannot be known on this machine.
    """
    config: Any = read_plan_config(name, overrides)
    if isinstance(config, GeneratorConfig):
        training = replace(config.training, dry_run=STEPS)
        return [_run(partial(generation.dry_run, training, train))]
    if isinstance(config, MLLMConfig):
        return [_run(partial(mllm.dry_run, replace(config, dry_run=STEPS), train_mllm))]
    if isinstance(config, TrainConfig):
        parts = [replace(config, dry_run=STEPS, stage=stage) for stage in config.stages]
        return [_run(partial(understanding.dry_run, part, run_stage)) for part in parts]
    # Without engines, whose part is arithmetic.
    stages = [replace(config, dry_run=STEPS, zero=0, stage=number) for number in config.stages]
    plans = [_run(partial(tokenizer.dry_run, stage, train_stage)) for stage in stages]
    for report, _ in plans:
        report.zero = config.zero
    return plans


def _unchecked(*parts: Any) -> None:
    """In place of a check that compares values, of which there are none."""


def _run(job: Callable[[], list[Report]]) -> tuple[Report, float]:
    with (
        fake_gpu(host_limit=HOST_LIMIT) as gpu,
        mock.patch.object(trainer, "deepspeed_settings", return_value=None),
        mock.patch.object(build, "check_features", new=_unchecked),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        [report] = job()
    return report, gpu.marks[-1] - gpu.marks[-2]


def read_plan_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration of that name, as the dataclass that reads it; see `plan`."""
    if name.endswith((".yaml", ".yml")):
        candidates = [(cls, Path(name)) for cls in READERS.values()]
    else:
        shipped = {}
        for package in READERS:
            for stem in shipped_names(f"vqrae.{package}"):
                shipped[f"{package}/{stem}"] = (package, stem)
        found = [key for key in shipped if name in (key, shipped[key][1])]
        if not found:
            raise ConfigError(f"config {name!r} is unknown. {did_you_mean(name, shipped)}")
        if len(found) > 1:
            raise ConfigError(f"config {name!r} is one of {', '.join(found)}: say which")
        package, stem = shipped[found[0]]
        candidates = [(READERS[package], shipped_config(f"vqrae.{package}", stem))]
    problems = []
    for cls, path in candidates:
        prefix = "training." if cls is GeneratorConfig else ""
        try:
            return load_config(cls, path, [prefix + override for override in overrides])
        except ConfigError as error:
            problems.append(error)
    raise min(problems, key=lambda error: str(error).count("\n"))  # of the reader that fits best


# ---- for people


def render(report: Report, flops: float, *, gpus: Sequence[int], gpu_memory: float) -> str:
    """The plan of a training, with the FLOPs of a micro-batch, for GPUs of `gpu_memory` GB."""
    budget = USABLE * gpu_memory * GIB
    batch = report.global_batch_size
    per_step = flops * batch / report.micro_batch_size
    switched = "on" if report.checkpointing else "off"
    lines = [
        f"----- {report.name}: global batch {batch:,}, micro-batch {report.micro_batch_size}, "
        f"zero={report.zero} -----",
        *report.table(),
        f"a micro-batch of {report.micro_batch_size} {report.samples} works in "
        f"{report.working_bytes / GIB:.1f} GiB, activation checkpointing is {switched}",
        f"{per_step:.3g} FLOPs a step, {per_step * report.max_steps:.3g} in {report.max_steps:,}",
        f"GiB on each GPU; * is the configuration's; ! is above {USABLE:.0%} of {gpu_memory:g} GB",
        "",
    ]
    zeros = [f"zero={zero}" for zero in report.zeros]
    header = ["GPUs", *zeros, "accumulation", f"what fits at zero={report.zero}"]
    rows = []
    for count in gpus:
        cells = [str(count)]
        for zero in report.zeros:
            need = report.memory(zero, count)
            marks = ("!" if need > budget else "") + ("*" if zero == report.zero else "")
            cells.append(f"{need / GIB:.1f}{marks}")
        cells.append(_accumulation(report, count, report.micro_batch_size))
        cells.append(_advice(report, count, budget))
        rows.append(cells)
    return "\n".join([*lines, *markdown_table(header, rows)])


def _accumulation(report: Report, gpus: int, micro_batch_size: int) -> str:
    steps, remainder = divmod(report.global_batch_size, micro_batch_size * gpus)
    return "does not divide" if remainder else str(steps)


def _largest(report: Report, gpus: int, zero: int, budget: float) -> int | None:
    """The largest micro-batch that fits and divides each GPU's share of the global batch."""
    share, remainder = divmod(report.global_batch_size, gpus)
    if remainder:
        return None
    for size in range(min(report.micro_batch_size, share), 0, -1):
        if share % size == 0 and report.memory(zero, gpus, size) <= budget:
            return size
    return None


def _advice(report: Report, gpus: int, budget: float) -> str:
    if report.global_batch_size % gpus:
        return "does not divide"
    for zero in [z for z in report.zeros if z >= report.zero]:
        micro = _largest(report, gpus, zero, budget)
        if micro is not None and zero == report.zero:
            return f"micro-batch {micro}, accumulation {_accumulation(report, gpus, micro)}"
        if micro is not None:
            return f"only zero={zero}, micro-batch {micro}"
    return "nothing"
