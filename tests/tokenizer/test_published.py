"""The three published variants: every value of VQRAE's Table 7, and models of the right size."""

from typing import Any

import pytest
import torch
from tokenizer_trainings import read
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vqrae.tokenizer.build import build_tokenizer

SIZES = {"siglip2_256": 256, "siglip2_512": 512, "internvit_448": 448}
# Table 7; its NA is a 0 here, which turns the term off.
# fmt: off
BOTH_STAGES = {
    "weight_decay": 1e-4, "adam_betas": (0.9, 0.999), "warmup_steps": 2000, "max_grad_norm": 1.0,
    # "convnext-s" with 1.1 is, in its code lineage, 1.0 LPIPS + 0.1 ConvNeXt-S.
    "perceptual_weight": 1.1, "perceptual_network": "lpips+convnext_s",
    "perceptual_mix": (1.0, 0.1),
    "reconstruction_weight": 1.0, "codebook_weight": 1.0, "commitment_weight": 0.25,  # Eq. 2 to 4
    # What serves the embedded default alone.
    "bypass_steps": 0, "revival_interval": 0, "discriminator_ramp": 0,
}
BY_STAGE = {
    1: {"freeze_encoder": True, "decoder_lr": 4e-4, "end_lr": 1e-4, "encoder_lr": 0,
        "distillation_weight": 0, "adversarial_weight": 0, "discriminator_lr": 0},
    2: {"freeze_encoder": False, "decoder_lr": 1e-4, "end_lr": 1e-5, "encoder_lr": 1e-5,
        "distillation_weight": 1.0, "adversarial_weight": 0.1, "discriminator_lr": 4e-5},
}
BY_VARIANT = {  # batch; steps of stage 1; steps of stage 2; start of its discriminator
    "siglip2_256": (1024, 100_000, 70_000, 50_000),
    "siglip2_512": (1024, 100_000, 70_000, 50_000),
    "internvit_448": (768, 45_000, 60_000, 30_000),
}
# fmt: on


@pytest.mark.parametrize("variant", SIZES)
def test_every_value_of_table_7(variant: str) -> None:
    config = read(variant)
    batch, steps_1, steps_2, start = BY_VARIANT[variant]
    for number, steps in ((1, steps_1), (2, steps_2)):
        stage = config.stage_config(number)
        expected: dict[str, Any] = {**BOTH_STAGES, **BY_STAGE[number], "global_batch_size": batch}
        expected |= {"max_steps": steps, "discriminator_start": start if number == 2 else 0}
        assert {name: getattr(stage, name) for name in expected} == expected
        assert batch % (8 * stage.micro_batch_size) == 0  # the hardware of the header
    model, data = config.model, config.data
    assert (model.codebook_size, model.codebook_dim, model.quantizer) == (16384, 1536, "simvq")
    assert (model.codebook_init, model.feature_norm) == ("random", "none")
    assert model.output_basis == "pixels"
    assert (config.bf16, config.ema_decay) == (True, 0)
    assert (data.crop, data.random_flip, data.cutmix) == ("random", True, 0)


@pytest.mark.parametrize("variant", SIZES)
def test_variants_have_their_size(variant: str) -> None:
    internvit = variant == "internvit_448"
    width, hidden, depth, patch = (1024, 4096, 24, 14) if internvit else (1152, 4304, 27, 16)
    tokens = 256 if variant == "siglip2_256" else 1024
    with torch.device("meta"):
        model = build_tokenizer(read(variant, "model.encoder=").model, "sdpa")
        if internvit:  # InternViT-300M is the default of the class
            encoder = InternVLVisionModel(InternVLVisionConfig(attention_bias=True))
        else:
            values = {"hidden_size": width, "intermediate_size": hidden, "patch_size": patch}
            values |= {"num_hidden_layers": depth, "num_attention_heads": 16}
            values |= {"image_size": SIZES[variant], "vision_use_head": False}
            encoder = SiglipVisionModel(SiglipVisionConfig(**values))
    count = encoder.num_parameters()
    assert model.encoder.num_parameters() == count
    # Attention with four biased matrices, MLP, two norms, and the two scales of InternViT.
    block = 4 * (width + 1) * width + 2 * width * hidden + hidden + width + 4 * width
    block += 2 * width if internvit else 0
    assert abs(count - depth * block) < 0.006 * count  # the rest: patches, positions, last norm
    decoder = depth * block + tokens * width + 2 * width + (width + 1) * 3 * patch**2
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) == decoder
    projections = (width + 1) * 1536 + (1536 + 1) * width
    simvq = (1536 + 1) * 1536  # the codebook itself is a frozen buffer
    assert model.num_parameters() == count + projections + simvq + decoder
    assert model.quantizer.codebook.shape == (16384, 1536)
    config = model.config
    assert config.grid_size**2 == tokens
    assert config.image_size == config.output_size == SIZES[variant]
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config.image_mean, config.image_std) == (imagenet if internvit else ((0.5,) * 3,) * 2)


def test_one_value_makes_512_pixels_of_internvit() -> None:
    config = read("internvit_448", "model.encoder=", "model.output_patch_size=16")
    with torch.device("meta"):
        model = build_tokenizer(config.model, "sdpa")
    assert (model.config.image_size, model.config.output_size) == (448, 512)
    assert model.decoder.head.out_features == 3 * 16**2
