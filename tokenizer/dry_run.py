"""`dry_run=N`: the real configuration for N steps on rendered scenes, then what it took and what the full run would need.

Nothing is downloaded and nothing is kept. Weights that are not on this machine are random, which changes no figure here; the
discriminator takes part from the first step on; the global batch is one micro-batch of every process.
"""

import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from vqrae.common.distributed import attention_implementation, is_main_process, world_size
from vqrae.common.memory import GIB, count_parameters, state_bytes, weight_bytes
from vqrae.common.run import RunDirectory, format_duration
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.stage import StageTrainer
from vqrae.tokenizer.train_config import ModelConfig, TokenizerTrainConfig

GPUS = 8  # of the machine that memory is estimated for


def dry_run(config: TokenizerTrainConfig) -> None:
    """Rehearse the configured stages one after the other and print a report on each."""
    for number in [1, 2] if config.stage == "both" else [config.stage]:
        with tempfile.TemporaryDirectory() as folder:
            rehearsed = rehearsal(config, number)
            run = RunDirectory(folder, rehearsed, seed=config.seed)
            report = measure(rehearsed, number, run)
        if is_main_process():
            print(render(report, config, number), flush=True)


def rehearsal(config: TokenizerTrainConfig, number: int) -> TokenizerTrainConfig:
    """The configuration of `dry_run` steps of a stage: everything that takes time or memory is in each of them."""
    stage = config.stage_config(number)
    short = dataclasses.replace(
        stage,
        max_steps=config.dry_run,
        global_batch_size=stage.micro_batch_size * world_size(),
        discriminator_start=0,
        bypass_steps=0,
        revival_interval=0,
    )
    stages: dict[str, Any] = {f"stage{number}": short}
    return dataclasses.replace(
        config,
        **stages,
        model=without_download(config.model),
        data=dataclasses.replace(config.data, train="scenes", validation=None, num_workers=0),
        micro_batch_size=None,
        random_perceptual_weights=True,
    )


def without_download(model: ModelConfig) -> ModelConfig:
    """The same model from random weights, where its encoder is not on this machine but its configuration is known."""
    if model.encoder is None or model.encoder_config is None or Path(model.encoder).is_dir():
        return model
    cached = isinstance(try_to_load_from_cache(model.encoder, "config.json"), str)
    return model if cached else dataclasses.replace(model, encoder=None)


def measure(config: TokenizerTrainConfig, number: int, run: RunDirectory) -> dict[str, Any]:
    """Run the rehearsal.

    Returns:
        `parts`: parameters (all, trained) by name; `seconds` of each step; `peak_bytes` of this process; `before_bytes` that
        it held before anything was built; `working_bytes` that come on top of weights, gradients and moments; `gpu_bytes`
        of these three on each of `GPUS` GPUs, by ZeRO stage.
    """
    before = held_bytes()
    model = build_tokenizer(config.model, attention_implementation(config.attention))
    trainer = StageTrainer(config, number, model, run)
    trainer.set_mode()
    batches = trainer.pictures.micro_batches(0)
    seconds = []
    for step in range(config.dry_run):
        begin = time.perf_counter()
        trainer.train_step(step, batches)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if is_main_process():
            print(f"dry run of stage {number}: step {step + 1}/{config.dry_run} took {seconds[-1]:.1f} s", flush=True)
    modules = {
        "encoder": model.encoder,
        "projections": nn.ModuleList([model.in_proj, model.out_proj]),
        "quantizer": model.quantizer,
        "decoder": model.decoder,
        "tokenizer, total": model,
        "teacher": trainer.teacher,
        "perceptual network": trainer.perceptual,
        "discriminator": trainer.discriminator if trainer.stage.adversarial_weight else None,
    }
    present = {name: module for name, module in modules.items() if module is not None}
    resident = nn.ModuleList(present.values())  # counts what is part of several only once
    weights, (_, trained) = weight_bytes(resident), count_parameters(resident)
    report = {
        "parts": {name: count_parameters(module) for name, module in present.items()},
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "before_bytes": before,
        "working_bytes": max(0.0, peak_bytes() - before - state_bytes(weights, trained, zero=0, gpus=1)),
        "gpu_bytes": {zero: state_bytes(weights, trained, zero=zero, gpus=GPUS) for zero in (0, 1, 2)},
    }
    trainer.engine.free_memory()
    trainer.d_engine.free_memory()
    return report


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def render(report: dict[str, Any], config: TokenizerTrainConfig, number: int) -> str:
    """The report for people."""
    stage = config.stage_config(number)
    batch = stage.micro_batch_size * world_size()
    steady = report["seconds"][1:] or report["seconds"]
    per_step = sum(steady) / len(steady)
    pictures = stage.max_steps * stage.global_batch_size
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"----- dry run of stage {number}: {len(report['seconds'])} steps of {batch} pictures -----",
        f"{'parameters':24}{'all':>14}{'trained':>14}",
        *(f"  {name:22}{total:14,}{trained:14,}" for name, (total, trained) in report["parts"].items()),
        f"measured on {world_size()} x {device}, micro-batch {stage.micro_batch_size}, "
        f"activation checkpointing {'on' if config.activation_checkpointing else 'off'}",
        f"  {'peak memory':22}{report['peak_bytes'] / GIB:8.2f} GiB per process ({report['before_bytes'] / GIB:.2f} before)",
        f"  {'seconds per step':22}{per_step:8.2f} (the first {report['seconds'][0]:.2f})",
        f"the full stage: {stage.max_steps:,} steps of {stage.global_batch_size:,} = {pictures:,} pictures",
        f"  {'time at this speed':22}{format_duration(per_step * pictures / batch):>8}",
        f"memory of each of {GPUS} GPUs: weights, gradients and moments by arithmetic, "
        f"and {report['working_bytes'] / GIB:.1f} GiB that the micro-batch took here",
        *(
            f"  {f'zero={zero}':22}{(state + report['working_bytes']) / GIB:8.1f} GiB"
            for zero, state in report["gpu_bytes"].items()
        ),
    ]
    return "\n".join(lines)
