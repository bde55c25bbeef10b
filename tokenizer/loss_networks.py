"""Networks that say how good a reconstruction is: teacher, perceptual network, discriminator."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from vqrae.tokenizer.config import StageConfig, TokenizerTrainConfig
from vqrae.tokenizer.discriminator import build_discriminator
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.perceptual import build_perceptual
from vqrae.tokenizer.teacher import original_encoder


class Judges(NamedTuple):
    """Those that a stage has a weight for; the others are None."""

    teacher: PreTrainedModel | None
    perceptual: nn.Module | None
    discriminator: nn.Module | None


def build_judges(
    config: TokenizerTrainConfig,
    stage: StageConfig,
    model: VQRAEModel,
    original: Path,
    device: torch.device,
) -> Judges:
    """The judges of a stage, on a device.

    Args:
        model: the tokenizer as it enters the stage.
        original: file that `keep_original` wrote, or none.
    """
    teacher = (
        original_encoder(model.encoder, original, bf16=config.bf16) if stage.needs_teacher else None
    )
    perceptual = discriminator = None
    if stage.perceptual_weight:
        perceptual = build_perceptual(
            stage.perceptual_network,
            stage.perceptual_mix,
            teacher=teacher,
            normalize=model.normalize,
            folder=config.perceptual_weights,
            random=config.random_perceptual_weights,
        ).to(device)
    if stage.adversarial_weight:
        discriminator = build_discriminator(
            stage.discriminator,
            channels=stage.discriminator_channels,
            backbone=stage.discriminator_backbone,
            random_backbone=config.random_perceptual_weights,
        ).to(device)
    return Judges(teacher, perceptual, discriminator)
