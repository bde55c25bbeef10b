"""What a person sees of a tokenizer's training: its size, its numbers, its previews."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vqrae.common.checkpoints import count_parameters
from vqrae.common.images import image_grid, save_image
from vqrae.common.run import format_duration
from vqrae.tokenizer.config import StageConfig
from vqrae.tokenizer.data import resize
from vqrae.tokenizer.modeling import VQRAEModel


def print_start(
    number: int, stage: StageConfig, model: VQRAEModel, *, start: int, accumulation: int, world: int
) -> None:
    """Say what a stage trains, and how a batch is put together.

    Args:
        number: of the stage.
        start: the step that it goes on from.
        accumulation: micro-batches of a step on each of `world` processes.
    """
    if start:
        print(f"stage {number}: continuing from step {start}", flush=True)
    total, trainable = count_parameters(model)
    print(
        f"stage {number}: {total / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trainable, "
        f"batch {stage.global_batch_size} = {stage.micro_batch_size} x {accumulation} accumulated "
        f"x {world} processes",
        flush=True,
    )
    if stage.contrastive_weight and accumulation > 1:
        print(
            f"stage {number}: each caption is told from those of {stage.micro_batch_size * world} "
            f"images, not of {stage.global_batch_size}: the contrastive loss sees one micro-batch",
            flush=True,
        )


def print_step(
    number: int, stage: StageConfig, done: int, row: dict[str, float], seconds: float
) -> None:
    """The numbers of a step on one line.

    Args:
        seconds: of one step.
    """
    left = format_duration(seconds * (stage.max_steps - done))
    numbers = [f"{key.removesuffix('_loss')} {row[key]:.4g}" for key in row]
    print(
        f"stage {number}  {done}/{stage.max_steps}  {'  '.join(numbers)}  {left} left", flush=True
    )


@torch.no_grad()
def save_previews(model: VQRAEModel, images: Tensor, file: Path, *, bf16: bool) -> Image.Image:
    """Write a grid of images (M, 3, H, W) in [0, 1] above their reconstructions, and return it.

    The model is left in evaluation mode.
    """
    model.eval()
    config = model.config
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        reconstruction = model(resize(images, config.image_size)).reconstruction
    rows = [list(resize(images, config.output_size)), list(reconstruction)]
    grid = image_grid(rows)
    save_image(grid, file)
    return grid
