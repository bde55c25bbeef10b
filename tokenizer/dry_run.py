"""`dry_run=N`: the real configuration for N steps on rendered scenes, then what it took and what the full run would need.

Nothing is downloaded and nothing is kept (see `vqrae.common.dry_run`). The discriminator takes part from the first step on; the
global batch is one micro-batch of every process. Behind the steps come previews, a checkpoint and its restore.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vqrae.common.distributed import attention_implementation, is_main_process, world_size
from vqrae.common.dry_run import GPUS, DryRunReport, held_bytes, is_here, peak_bytes
from vqrae.common.memory import GIB, count_parameters, state_bytes, weight_bytes
from vqrae.common.run import RunDirectory
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import ModelConfig, StageConfig, TokenizerTrainConfig
from vqrae.tokenizer.configuration import FEATURE_TAPS
from vqrae.tokenizer.data import resize
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.losses import distillation_loss
from vqrae.tokenizer.stage import StageTrainer


def dry_run(config: TokenizerTrainConfig) -> None:
    """Rehearse the configured stages one after the other and print a report on each."""
    for number in [1, 2] if config.stage == "both" else [config.stage]:
        with scratch_folder(Path(config.output_dir)) as folder:
            rehearsed = rehearsal(config, number)
            run = RunDirectory(folder / f"stage{number}", rehearsed, seed=config.seed)
            run.begin()
            report = measure(rehearsed, number, run, config.stage_config(number))
        if is_main_process():
            print(report.text(), flush=True)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder next to `output`, on the disk that the run will write to and that all processes see; removed at the end."""
    folder = output.absolute().with_name(f".{output.name}.dry_run")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        yield folder
    finally:
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # somebody else uses it by now
                for parent in made:
                    parent.rmdir()


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


def rehearse_checkpoint(trainer: StageTrainer, step: int) -> None:
    """Previews, a checkpoint and its restore, and what the features are at both taps."""
    begin = time.perf_counter()
    trainer.save(step)
    if is_main_process():
        trainer.save_previews(step)
    checkpoint = trainer.run.path / f"step-{step}"
    trainer.restore(checkpoint)
    trainer.engine.wait_for_everyone()
    if is_main_process():
        gib = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / GIB
        seconds = time.perf_counter() - begin
        print(
            f"dry run of stage {trainer.number}: previews, a checkpoint of {gib:.2f} GiB and its restore: {seconds:.1f} s"
        )
        print("\n".join(describe_taps(trainer)), flush=True)
    trainer.engine.wait_for_everyone()


@torch.no_grad()
def describe_taps(trainer: StageTrainer) -> list[str]:
    """How large the features are at each tap, and what their distillation loss would be after these steps."""
    model = trainer.model
    lines = [
        "features of the preview images: root mean square, largest channel's, distillation loss"
    ]
    with trainer.autocast():
        pixel_values = model.normalize(resize(trainer.previews, trainer.image_size))
        for tap in FEATURE_TAPS:
            features = encoder_features(model.encoder, pixel_values, tap).float()
            loss = "no teacher"
            if trainer.teacher is not None:
                loss = f"{distillation_loss(features, encoder_features(trainer.teacher, pixel_values, tap)):.3g}"
            squares = features.square().mean((0, 1))
            chosen = "  (feature_tap of this run)" if tap == model.config.feature_tap else ""
            lines.append(
                f"  {tap:22}{squares.mean().sqrt():10.3g}{squares.max().sqrt():10.3g}  {loss:>10}{chosen}"
            )
    return lines


def measure(
    config: TokenizerTrainConfig, number: int, run: RunDirectory, full: StageConfig
) -> DryRunReport:
    """Run the rehearsal of a stage that is `full` in reality."""
    before = held_bytes()
    model = build_tokenizer(
        config.model, attention_implementation(config.attention, half=config.bf16)
    )
    trainer = StageTrainer(config, number, model, run)
    trainer.set_mode()
    batches = trainer.images.micro_batches(0)
    seconds = []
    for step in range(config.dry_run):
        begin = time.perf_counter()
        trainer.train_step(step, batches)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if is_main_process():
            print(
                f"dry run of stage {number}: step {step + 1}/{config.dry_run} took {seconds[-1]:.1f} s",
                flush=True,
            )
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
        samples="images",
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
    rehearse_checkpoint(trainer, config.dry_run)
    trainer.engine.free_memory()
    trainer.d_engine.free_memory()
    return report
