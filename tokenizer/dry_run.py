"""`dry_run=N`: the real configuration for N steps on rendered scenes, then what it took and what the full run would need.

Nothing is downloaded and nothing is kept (see `vqrae.common.dry_run`). The discriminator takes part from the first step on; the
global batch is one micro-batch of every process. A checkpoint, previews and a restore follow the steps.
"""

import dataclasses
import gc
import itertools
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import set_seed

from vqrae.common.distributed import attention_implementation, is_main_process, world_size
from vqrae.common.dry_run import GPUS, DryRunReport, held_bytes, is_here, peak_bytes
from vqrae.common.memory import GIB, count_parameters, state_bytes, weight_bytes
from vqrae.common.run import Run, read_metrics
from vqrae.common.run import open as open_run
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import ModelConfig, StageConfig, TokenizerTrainConfig
from vqrae.tokenizer.configuration import FEATURE_TAPS
from vqrae.tokenizer.data import StageImages
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.losses import build_loss_networks, distillation_loss
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.train import train_stage


def dry_run(config: TokenizerTrainConfig) -> None:
    """Rehearse the configured stages one after the other and print a report on each."""
    for number in [1, 2] if config.stage == "both" else [config.stage]:
        with scratch_folder(Path(config.output_dir)) as folder:
            rehearsed = rehearsal(config, number)
            run = open_run(folder / f"stage{number}", rehearsed, seed=config.seed)
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
        max_steps=config.dry_run + 1,  # the last one is not taken: it would write the model
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
        log_steps=1,
        save_steps=max(1, config.dry_run),
        sample_steps=max(1, config.dry_run),
    )


def without_download(model: ModelConfig) -> ModelConfig:
    """The same model from random weights, where its encoder is not on this machine but its configuration is known."""
    if model.encoder is None or model.encoder_config is None or is_here(model.encoder):
        return model
    return dataclasses.replace(model, encoder=None)


def measure(config: TokenizerTrainConfig, number: int, run: Run, full: StageConfig) -> DryRunReport:
    """Run the rehearsal of a stage that is `full` in reality, with a checkpoint and its restore."""
    before = held_bytes()
    model = build_model(config)
    steps = train_stage(config, number, model, run)
    for done in itertools.islice(steps, 1 + config.dry_run):  # and a checkpoint, and previews
        if is_main_process() and done:
            print(f"dry run of stage {number}: step {done}/{config.dry_run}", flush=True)
    peak = peak_bytes()
    # Parameters as numbers alone: the networks themselves are those of the loop.
    with torch.device("meta"):
        stage, original = config.stage_config(number), Path("none")
        networks = build_loss_networks(config, stage, model, original, torch.device("meta"))
    modules = {
        "encoder": model.encoder,
        "projections": nn.ModuleList([model.in_proj, model.out_proj]),
        "quantizer": model.quantizer,
        "decoder": model.decoder,
        "tokenizer, total": model,
        "teacher": networks.teacher,
        "perceptual network": networks.perceptual,
        "discriminator": networks.discriminator,
    }
    present = {name: module for name, module in modules.items() if module is not None}
    resident = nn.ModuleList(present.values())  # counts what is part of several only once
    weights, (_, trained) = weight_bytes(resident), count_parameters(resident)
    rows = read_metrics(run.path)
    report = DryRunReport(
        name=f"stage {number}",
        samples="images",
        parts={name: count_parameters(module) for name, module in present.items()},
        seconds=[stage.global_batch_size / row["images_per_second"] for row in rows],
        before_bytes=before,
        peak_bytes=peak,
        model_bytes=state_bytes(weights, trained, zero=0, gpus=1),
        gpu_bytes={zero: state_bytes(weights, trained, zero=zero, gpus=GPUS) for zero in (0, 1, 2)},
        micro_batch_size=full.micro_batch_size,
        activation_checkpointing=config.activation_checkpointing,
        max_steps=full.max_steps,
        global_batch_size=full.global_batch_size,
    )
    del model, steps, networks, modules, present, resident
    gc.collect()
    rehearse_restore(config, number, run)
    return report


def build_model(config: TokenizerTrainConfig) -> VQRAEModel:
    """The tokenizer as it enters the rehearsal; the same one in every call."""
    set_seed(config.seed)
    attention = attention_implementation(config.attention, half=config.bf16)
    return build_tokenizer(config.model, attention)


def rehearse_restore(config: TokenizerTrainConfig, number: int, run: Run) -> None:
    """Resume from the checkpoint, and say how large its features are at both taps, next to the original encoder's."""
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    model = build_model(config)
    images = StageImages(
        config.data,
        config.stage_config(number),
        size=model.config.image_size,
        seed=config.seed,
        number=number,
        rank=0,
        world_size=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    ).previews()
    originals = tap_features(config, model.to(images.device), images)
    begin = time.perf_counter()
    steps = train_stage(config, number, model, run)
    assert next(steps) == config.dry_run
    seconds = time.perf_counter() - begin
    if is_main_process():
        gib = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / GIB
        print(
            f"dry run of stage {number}: a checkpoint of {gib:.2f} GiB, restored in {seconds:.1f} s"
        )
        print(
            "features of validation images: root mean square, largest channel's, distillation loss"
        )
        for tap, features in tap_features(config, model, images).items():
            squares = features.square().mean((0, 1))
            chosen = "  (feature_tap of this run)" if tap == model.config.feature_tap else ""
            print(
                f"  {tap:22}{squares.mean().sqrt():10.3g}{squares.max().sqrt():10.3g}"
                f"  {distillation_loss(features, originals[tap]):10.3g}{chosen}",
                flush=True,
            )


@torch.no_grad()
def tap_features(
    config: TokenizerTrainConfig, model: VQRAEModel, images: Tensor
) -> dict[str, Tensor]:
    """Features of images at each tap."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bf16):
        pixel_values = model.normalize(images)
        return {
            tap: encoder_features(model.encoder, pixel_values, tap).float() for tap in FEATURE_TAPS
        }
