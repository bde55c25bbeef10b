"""Encoders from every kind of checkpoint that holds one, and their features."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
)

from vqrae.tokenizer.build import at_image_size, build_tokenizer
from vqrae.tokenizer.config import ModelConfig
from vqrae.tokenizer.encoders import encoder_features, load_encoder
from vqrae.tokenizer.modeling import VQRAEModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}
SIGLIP = {**SIZES, "image_size": 64, "patch_size": 8, "attention_dropout": 0.1}
INTERNVIT = {**SIZES, "image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True}
INTERNVIT |= {"hidden_dropout_prob": 0.1}
# Names of OpenGVLab's releases.
OPENGVLAB_NAMES = {
    "cls_token": "class_embedding", "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding", "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj", "lambda_": "ls", "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}  # fmt: skip


def whole_siglip(folder: Path) -> PreTrainedModel:
    model = SiglipModel(SiglipConfig(vision_config=SIGLIP, text_config={**SIZES, "vocab_size": 40}))
    model.save_pretrained(folder)
    return model.vision_model


def whole_internvl(folder: Path) -> PreTrainedModel:
    text = {**SIZES, "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 40}
    model = InternVLForConditionalGeneration(
        InternVLConfig(vision_config=INTERNVIT, text_config=text)
    ).bfloat16()
    model.save_pretrained(folder)
    return model.model.vision_tower


def opengvlab(folder: Path) -> PreTrainedModel:
    """InternViT as OpenGVLab releases it: other names, one matrix for queries, keys and values."""
    model = InternVLVisionModel(InternVLVisionConfig(**INTERNVIT))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    state = {}
    weights = model.state_dict()
    for key, tensor in weights.items():
        if match := re.fullmatch(r"(.*)\.attention\.q_proj\.(.*)", key):
            layer, name = match.groups()
            parts = [weights[f"{layer}.attention.{part}_proj.{name}"] for part in "qkv"]
            key, tensor = f"{layer}.attn.qkv.{name}", torch.cat(parts)
        elif re.search(r"\.[kv]_proj\.", key):
            continue
        for ours, theirs in OPENGVLAB_NAMES.items():
            key = key.replace(ours, theirs)
        state[key] = tensor
    values = {**SIZES, "model_type": "intern_vit_6b", "image_size": 56, "patch_size": 14}
    values |= {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**values, "drop_path_rate": 0.1}))
    save_file(state, folder / "model.safetensors")
    return model


@torch.no_grad()
@pytest.mark.parametrize("make", [whole_siglip, whole_internvl, opengvlab])
def test_encoders_of_published_checkpoints(
    make: Callable[[Path], PreTrainedModel], tmp_path: Path
) -> None:
    expected = make(tmp_path / "checkpoint").eval().float()
    encoder = load_encoder(str(tmp_path / "checkpoint"), "eager").eval()
    pixel_values = torch.randn(2, 3, *([64, 64] if make is whole_siglip else [56, 56]))
    states = expected(pixel_values, output_hidden_states=True)
    first = 0 if make is whole_siglip else 1  # InternViT's class token
    for tap, state in (
        ("hidden_states[-1]", states.hidden_states[-1]),
        ("last_hidden_state", states.last_hidden_state),
    ):
        torch.testing.assert_close(encoder_features(encoder, pixel_values, tap), state[:, first:])
    assert encoder.dtype == torch.float32
    assert not getattr(encoder, "use_head", False)
    assert encoder.config.attention_dropout == 0
    assert all(
        module.p == 0 for module in encoder.modules() if isinstance(module, torch.nn.Dropout)
    )


def test_a_tokenizer_starts_from_a_checkpoint(tmp_path: Path) -> None:
    expected = whole_internvl(tmp_path / "checkpoint")
    options = {
        "encoder": str(tmp_path / "checkpoint"),
        "codebook_size": 16,
        "codebook_dim": 8,
        "output_patch_size": 16,
    }
    model = build_tokenizer(
        ModelConfig(**options, encoder_config={"num_hidden_layers": 2, "image_size": [56, 56]}),
        "eager",
    )
    weights = model.encoder.state_dict()
    assert all(
        torch.equal(weights[key], value.float()) for key, value in expected.state_dict().items()
    )
    model.save_pretrained(tmp_path / "tokenizer")
    assert VQRAEModel.from_pretrained(tmp_path / "tokenizer").config.output_size == 64
    with pytest.raises(ValueError, match=r"num_hidden_layers: .*checkpoint has 2, expected 24"):
        build_tokenizer(ModelConfig(**options, encoder_config={"num_hidden_layers": 24}), "eager")


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    whole_siglip(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({key: tensor for key, tensor in state.items() if "layers.1.mlp" not in key}, file)
    with pytest.raises(ValueError, match=r"lacks weights of a SiglipVisionModel, .*layers\.1\.mlp"):
        load_encoder(str(tmp_path), "eager")
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ValueError, match="'siglip2' checkpoint, expected an encoder"):
        load_encoder(str(tmp_path), "eager")


def test_a_siglip_is_taken_to_another_size(tmp_path: Path) -> None:
    vision = whole_siglip(tmp_path)
    table = vision.embeddings.position_embedding.weight
    with torch.no_grad():  # a plane, which bicubic resampling keeps but for the border
        steps = torch.arange(8.0)
        table[:] = (steps[:, None] + 10 * steps).flatten()[:, None]
    vision.save_pretrained(tmp_path / "vision")
    config = ModelConfig(encoder=str(tmp_path / "vision"), image_size=128, codebook_dim=16)
    model = build_tokenizer(config, "eager")
    assert model.config.grid_size == 16
    assert model.decode(model.encode(torch.rand(1, 3, 128, 128))).shape == (1, 3, 128, 128)
    resampled = model.encoder.embeddings.position_embedding.weight[:, 0].view(16, 16)
    expected = torch.arange(16) / 2 - 0.25
    inside = slice(4, 12)
    plane = expected[inside, None] + 10 * expected[inside]
    torch.testing.assert_close(resampled[inside, inside], plane)
    with pytest.raises(ValueError, match="not a SigLIP"):
        at_image_size({"cls_token": table}, 16)
