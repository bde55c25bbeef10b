"""`dry_run=N`: the real configuration for N steps on rendered scenes, then what it took and what the full run would need.

Nothing is downloaded and nothing is kept (see `vqrae.common.dry_run`). The discriminator takes part from the first step on; the
global batch is one micro-batch of every process.
"""

import dataclasses
import tempfile
import time
from typing import Any

import torch
from torch import nn

from vqrae.common.distributed import attention_implementation, is_main_process, world_size
from vqrae.common.dry_run import GPUS, DryRunReport, held_bytes, is_here, peak_bytes
from vqrae.common.memory import count_parameters, state_bytes, weight_bytes
from vqrae.common.run import RunDirectory
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.stage import StageTrainer
from vqrae.tokenizer.train_config import ModelConfig, StageConfig, TokenizerTrainConfig


def dry_run(config: TokenizerTrainConfig) -> None:
    """Rehearse the configured stages one after the other and print a report on each."""
    for number in [1, 2] if config.stage == "both" else [config.stage]:
        with tempfile.TemporaryDirectory() as folder:
            rehearsed = rehearsal(config, number)
            run = RunDirectory(folder, rehearsed, seed=config.seed)
            run.begin()
            report = measure(rehearsed, number, run, config.stage_config(number))
        if is_main_process():
            print(report.text(), flush=True)


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
    if model.encoder is None or model.encoder_config is None or is_here(model.encoder):
        return model
    return dataclasses.replace(model, encoder=None)


def measure(config: TokenizerTrainConfig, number: int, run: RunDirectory, full: StageConfig) -> DryRunReport:
    """Run the rehearsal of a stage that is `full` in reality."""
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
    report = DryRunReport(
        name=f"stage {number}",
        samples="pictures",
        parts={name: count_parameters(module) for name, module in present.items()},
        seconds=seconds,
        before_bytes=before,
        peak_bytes=peak_bytes(),
        model_bytes=state_bytes(weights, trained, zero=0, gpus=1),
        gpu_bytes={zero: state_bytes(weights, trained, zero=zero, gpus=GPUS) for zero in (0, 1, 2)},
        micro_batch_size=full.micro_batch_size,
        activation_checkpointing=config.activation_checkpointing,
        max_steps=full.max_steps,
        global_batch_size=full.global_batch_size,
    )
    trainer.engine.free_memory()
    trainer.d_engine.free_memory()
    return report
