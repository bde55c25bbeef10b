"""`dry_run=N` of every training: N real steps, what they took, and what the full run would need.

The training runs as it is, on a configuration that its package shortened. Nothing is downloaded and
nothing is kept: models have the shapes of their configurations and random weights. `vqrae plan`
runs the same on a fake GPU.
"""

import contextlib
import gc
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, TrainerCallback

from vqrae.common import trainer as trainers
from vqrae.common.checkpoints import count_parameters, resolve_model
from vqrae.common.config import did_you_mean, read_yaml
from vqrae.common.distributed import is_main_process, world_size
from vqrae.common.run import format_duration
from vqrae.common.trainer import OptimizationConfig

GIB = 2**30
GPUS = 8  # of the machine that memory is estimated for


# The shapes of models, for machines that do not hold them.
KNOWN_MODELS: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("known_models.yaml"))


# ---- models without weights


def is_here(model: str) -> bool:
    """Whether a model can be read without a download: as a folder, or from the hub's cache."""
    return Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "config.json"), str)


def known_config(name: str) -> PreTrainedConfig:
    """The configuration of a model that is on this machine, or of one in `KNOWN_MODELS`."""
    if is_here(name):
        return AutoConfig.from_pretrained(resolve_model(name), local_files_only=True)
    if name not in KNOWN_MODELS:
        raise ValueError(f"{name}: not on this machine. {did_you_mean(name, KNOWN_MODELS)}")
    values = dict(KNOWN_MODELS[name])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def stand_in(folder: Path, config: PreTrainedConfig) -> str:
    """Write a model folder with a configuration and no weights, for `random_weights`."""
    config.save_pretrained(folder)
    save_file({"stand_in": torch.zeros(1)}, folder / "model.safetensors")  # has a fingerprint
    return str(folder)


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """In the block, `from_pretrained` builds models from their configurations alone."""

    def build(
        cls: Any,
        name: Any,
        *args: Any,
        config: Any = None,
        dtype: Any = None,
        attn_implementation: Any = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        if config is None:
            load = cls.config_class.from_pretrained
            config, _ = load(name, return_unused_kwargs=True, **options)
        chosen = {"dtype": dtype, "attn_implementation": attn_implementation}
        given = {key: value for key, value in chosen.items() if value is not None}
        model = cls._from_config(config, **given).eval()
        nothing = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
        return (model, nothing) if output_loading_info else model

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(build)):
        yield


@contextlib.contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder next to `output`, which all processes see; removed at the end."""
    folder = output.absolute().with_name(f".{output.name}.dry_run")
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else uses it by now
                for parent in made:
                    parent.rmdir()


# ---- measuring


class Finished(Exception):
    """The last step of a dry run is done; raised through a training that would go on."""


@dataclass(kw_only=True)
class Report:
    """What a dry run took, and the run that it rehearses."""

    name: str
    """Of the run or its stage."""
    samples: str
    """What the batches hold: images, sequences …"""
    micro_batch_size: int
    global_batch_size: int
    max_steps: int
    zero: int
    """The ZeRO stage that the configuration asks for."""
    checkpointing: bool
    """Whether activations are computed again in the backward pass."""
    half: bool = False
    """Whether DeepSpeed keeps weights and gradients in 16 bits, next to fp32 masters."""
    zeros: tuple[int, ...] = (0, 1, 2, 3)
    """The ZeRO stages that there are."""

    parts: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, parameters and trained parameters of each network, and of the parts of the largest."""
    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    before_bytes: int = 0
    peak_bytes: int = 0
    working_bytes: float = 0
    """What a micro-batch took on top of weights, gradients and optimizer states."""
    parameters: int = 0
    trained: int = 0
    """Both of the networks that are trained."""
    frozen_bytes: int = 0
    """Of the others, which no engine partitions."""

    def state_bytes(self, zero: int, gpus: int) -> float:
        """What weights, gradients and AdamW's moments occupy on each GPU.

        ZeRO partitions its fp32 copy of the weights and the moments, at stage 2 the gradients too,
        at stage 3 everything (1910.02054, section 3.1).
        """
        width = 2 if self.half and zero else 4
        weights, gradients = width * self.parameters, width * self.trained
        moments = 8 * self.trained
        masters = 4 * self.trained if zero else 0
        share = moments + masters
        if zero >= 2:
            share += gradients
        if zero == 3:
            share += weights
        whole = weights + gradients + moments + masters - share
        return whole + share / (gpus if zero else 1) + self.frozen_bytes

    def memory(self, zero: int, gpus: int, micro_batch_size: int | None = None) -> float:
        """Bytes on each GPU."""
        size = micro_batch_size or self.micro_batch_size
        return self.state_bytes(zero, gpus) + self.working_bytes * size / self.micro_batch_size

    def table(self) -> list[str]:
        """The parameters of each network."""
        rows = [f"  {name:30}{whole:16,}{trained:16,}" for name, whole, trained in self.parts]
        return [f"{'parameters':32}{'all':>16}{'trained':>16}", *rows]

    def text(self) -> str:
        """The report for people."""
        batch = self.micro_batch_size * world_size()
        steady = self.seconds[1:] or self.seconds  # the first step also allocates and compiles
        per_step = sum(steady) / len(steady)
        total = self.max_steps * self.global_batch_size
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        checkpointing = "on" if self.checkpointing else "off"
        peak, before = self.peak_bytes / GIB, self.before_bytes / GIB
        duration = format_duration(per_step * total / batch)
        steps = f"{len(self.seconds)} steps of {batch} {self.samples}"
        lines = [
            f"----- dry run of {self.name}: {steps} -----",
            *self.table(),
            f"measured on {world_size()} x {device}, micro-batch {self.micro_batch_size}, "
            f"activation checkpointing {checkpointing}",
            f"  {'peak memory':22}{peak:8.2f} GiB per process ({before:.2f} before)",
            f"  {'seconds per step':22}{per_step:8.2f} (the first {self.seconds[0]:.2f})",
            f"the full run: {self.max_steps:,} steps of {self.global_batch_size:,} "
            f"= {total:,} {self.samples}",
            f"  {'time at this speed':22}{duration:>8}",
            f"memory of each of {GPUS} GPUs: weights, gradients and moments by arithmetic, "
            f"and {self.working_bytes / GIB:.1f} GiB that the micro-batch took here",
        ]
        for zero in self.zeros:
            need = self.memory(zero, GPUS)
            lines += [f"  {f'zero={zero}':22}{need / GIB:8.1f} GiB"]
        return "\n".join(lines)


class Watch(TrainerCallback):
    """Measures the steps of a training, ends it after `steps` of them, and fills in the report."""

    def __init__(self, report: Report, steps: int) -> None:
        self.report, self.steps = report, steps
        self.seconds: list[float] = []
        self.others = {id(thing) for thing in _alive((nn.Module, torch.optim.Optimizer))}
        self.before = held_bytes()
        self.clock = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.step()

    def step(self) -> None:
        """Note the end of a step. Raises Finished after the last one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.clock)
        self.clock = time.perf_counter()
        if is_main_process():
            done = f"{len(self.seconds)}/{self.steps}"
            print(f"dry run: step {done} took {self.seconds[-1]:.1f} s", flush=True)
        if len(self.seconds) == self.steps:
            self._measure()
            raise Finished

    def _measure(self) -> None:
        gc.collect()
        report = self.report
        report.seconds, report.before_bytes = self.seconds, self.before
        report.peak_bytes = peak_bytes()
        networks = self._networks()
        trained = nn.ModuleList([each for each in networks if count_parameters(each)[1]])
        frozen = nn.ModuleList([each for each in networks if not count_parameters(each)[1]])
        report.parameters, report.trained = count_parameters(trained)
        in_trained = {id(tensor) for tensor in _tensors(trained)}
        report.frozen_bytes = _bytes(t for t in _tensors(frozen) if id(t) not in in_trained)
        report.parts = []
        for network in networks:
            report.parts.append((type(network).__name__, *count_parameters(network)))
        for name, child in networks[0].named_children():
            report.parts.append((f"  {name}", *count_parameters(child)))
        held = [*_tensors(trained), *_tensors(frozen)]
        if self.steps > 1:  # else the states came after the activations
            optimizers = _alive((torch.optim.Optimizer,))
            for optimizer in (each for each in optimizers if id(each) not in self.others):
                for group in optimizer.param_groups:
                    held += group["params"]
                for state in optimizer.state.values():
                    held += [value for value in state.values() if isinstance(value, Tensor)]
        gradients = _bytes(p for p in trained.parameters() if p.requires_grad)
        used = report.peak_bytes - self.before - _bytes(held) - gradients
        report.working_bytes = max(0, used)

    def _networks(self) -> list[nn.Module]:
        """The networks that the training built, the largest first."""
        networks: list[nn.Module] = []
        known: set[int] = set()
        alive = [_unwrapped(m) for m in _alive((nn.Module,)) if id(m) not in self.others]
        for module in sorted(alive, key=lambda module: -count_parameters(module)[0]):
            parameters = {id(parameter) for parameter in module.parameters()}
            if not parameters <= known:  # else it is a part of a larger one
                networks.append(module)
                known |= parameters
        return networks


def rehearse(train: Callable[[Watch], Any], report: Report, steps: int) -> Report:
    """Run a shortened training for this number of steps and fill in the report.

    `train` calls `Watch.step` after each step, unless it is a job on the `Trainer`.
    """
    gc.collect()
    watch = Watch(report, steps)
    watched = mock.patch.object(trainers, "WATCHERS", [watch])
    with random_weights(), watched, contextlib.suppress(Finished):
        train(watch)
    gc.collect()
    return report


def print_reports(reports: Sequence[Report]) -> None:
    """Show the reports of a dry run."""
    for report in reports if is_main_process() else ():
        print(report.text(), flush=True)


def shorten(config: OptimizationConfig, steps: int) -> OptimizationConfig:
    """Steps of one micro-batch on each process; on CPU of one sample."""
    micro = config.micro_batch_size if torch.cuda.is_available() else 1
    return replace(
        config,
        max_steps=steps,
        micro_batch_size=micro,
        global_batch_size=micro * world_size(),
        dataloader_num_workers=0,
    )


def trainer_report(name: str, samples: str, full: OptimizationConfig, micro: int) -> Report:
    """The report of a job on the `Trainer` that is rehearsed in micro-batches of `micro`."""
    keys = ("gradient_checkpointing", "activation_checkpointing")
    return Report(
        name=name,
        samples=samples,
        micro_batch_size=micro,
        global_batch_size=full.global_batch_size,
        max_steps=full.max_steps,
        zero=full.zero,
        checkpointing=any(full.extra.get(key) for key in keys),
        half=full.bf16,
    )


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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _alive(kinds: tuple[type, ...]) -> list[Any]:
    # Not isinstance, at which lazy and deprecated objects of libraries come to life.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


def _unwrapped(module: Any) -> nn.Module:
    """The network in an engine's wrapper."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module
    return module


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Any) -> int:
    """What tensors occupy, each storage once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
