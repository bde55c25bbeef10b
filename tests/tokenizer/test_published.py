"""The three published variants: every value of VQRAE's Table 7, and models of the right size."""

from typing import Any

import pytest
import torch
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vqrae.common.config import load_config, shipped_config
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import TokenizerTrainConfig

VARIANTS = ("siglip2_256", "siglip2_512", "internvit_448")

# Table 7, column by column; its NA is a 0 here, which turns the term off.
# fmt: off
BOTH_STAGES = {"weight_decay": 1e-4, "adam_betas": (0.9, 0.999), "warmup_steps": 2000, "max_grad_norm": 1.0,
               "perceptual_weight": 1.1}
STAGE_1 = {"freeze_encoder": True, "decoder_lr": 4e-4, "end_lr": 1e-4, "discriminator_start": 0, "adversarial_weight": 0,
           "discriminator_lr": 0, "distillation_weight": 0, "encoder_lr": 0}
STAGE_2 = {"freeze_encoder": False, "decoder_lr": 1e-4, "end_lr": 1e-5, "adversarial_weight": 0.1, "discriminator_lr": 4e-5,
           "distillation_weight": 1.0, "encoder_lr": 1e-5}
TABLE_7: dict[tuple[str, int], dict[str, Any]] = {
    ("siglip2_256", 1): {"global_batch_size": 1024, "max_steps": 100000},
    ("siglip2_512", 1): {"global_batch_size": 1024, "max_steps": 100000},
    ("internvit_448", 1): {"global_batch_size": 768, "max_steps": 45000},
    ("siglip2_256", 2): {"global_batch_size": 1024, "max_steps": 70000, "discriminator_start": 50000},
    ("siglip2_512", 2): {"global_batch_size": 1024, "max_steps": 70000, "discriminator_start": 50000},
    ("internvit_448", 2): {"global_batch_size": 768, "max_steps": 60000, "discriminator_start": 30000},
}
# fmt: on
RESOLUTIONS = {"siglip2_256": 256, "siglip2_512": 512, "internvit_448": 448}


def read(variant: str, *overrides: str) -> TokenizerTrainConfig:
    return load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", variant), overrides)


@pytest.mark.parametrize(("variant", "number"), TABLE_7)
def test_every_value_of_table_7(variant: str, number: int) -> None:
    config = read(variant)
    stage = config.stage_config(number)
    expected = BOTH_STAGES | (STAGE_1 if number == 1 else STAGE_2) | TABLE_7[variant, number]
    assert {name: getattr(stage, name) for name in expected} == expected
    # What the table's "convnext-s" with 1.1 stands for in its code lineage: 1.0 LPIPS + 0.1 ConvNeXt-S.
    assert (stage.perceptual_network, stage.perceptual_mix) == ("lpips+convnext_s", (1.0, 0.1))
    assert (stage.reconstruction_weight, stage.codebook_weight, stage.commitment_weight) == (
        1.0,
        1.0,
        0.25,
    )  # Eq. 2-4
    assert (config.model.codebook_size, config.model.codebook_dim, config.model.quantizer) == (
        16384,
        1536,
        "simvq",
    )
    assert config.bf16
    assert config.data.crop == "random"
    assert config.data.random_flip
    # What only serves the embedded default stays off.
    assert (config.model.codebook_init, config.model.feature_norm, config.model.output_basis) == (
        "random",
        "none",
        "pixels",
    )
    assert (
        stage.bypass_steps,
        stage.revival_interval,
        stage.discriminator_ramp,
        config.ema_decay,
    ) == (0, 0, 0, 0)
    assert stage.global_batch_size % (8 * stage.micro_batch_size) == 0  # the hardware of the header


def block_parameters(width: int, hidden: int, *, layer_scale: bool) -> int:
    """Attention with four biased matrices, MLP, two norms, and two scales where there are any."""
    return (
        4 * (width + 1) * width
        + 2 * width * hidden
        + hidden
        + width
        + 4 * width
        + (2 * width if layer_scale else 0)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_their_size(variant: str) -> None:
    config = read(variant, "model.encoder=")
    with torch.device("meta"):
        model = build_tokenizer(config.model, "sdpa")
        if variant == "internvit_448":
            encoder = InternVLVisionModel(
                InternVLVisionConfig(attention_bias=True)
            )  # InternViT-300M is the class's default
        else:
            values = {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
            }
            size = RESOLUTIONS[variant]
            encoder = SiglipVisionModel(
                SiglipVisionConfig(**values, image_size=size, patch_size=16, vision_use_head=False)
            )
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == count
    width, hidden, depth, patch = (
        (1024, 4096, 24, 14) if variant == "internvit_448" else (1152, 4304, 27, 16)
    )
    tokens = 256 if variant == "siglip2_256" else 1024
    blocks = depth * block_parameters(width, hidden, layer_scale=variant == "internvit_448")
    assert abs(count - blocks) < 0.006 * count  # the rest are patches, positions and the last norm
    decoder = blocks + tokens * width + 2 * width + (width + 1) * 3 * patch**2
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) == decoder
    projections = (width + 1) * 1536 + (1536 + 1) * width
    simvq = (1536 + 1) * 1536  # the codebook itself is a frozen buffer
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == count + projections + simvq + decoder
    )
    assert model.quantizer.codebook.shape == (16384, 1536)
    assert model.config.grid_size**2 == tokens
    assert model.config.image_size == model.config.output_size == RESOLUTIONS[variant]
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = imagenet if variant == "internvit_448" else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (model.config.image_mean, model.config.image_std) == expected


def test_one_value_makes_512_pixels_of_internvit() -> None:
    config = read("internvit_448", "model.encoder=", "model.output_patch_size=16")
    with torch.device("meta"):
        model = build_tokenizer(config.model, "sdpa")
    assert (model.config.image_size, model.config.output_size) == (448, 512)
    assert model.decoder.head.out_features == 3 * 16**2
