"""Pretrained encoders in the Hugging Face vision classes, and their features.

Shapes: B batch, H W pixels, N visual tokens, D feature width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from vqrae.common.checkpoints import load_model, local_model, require_finite, resolve_model
from vqrae.tokenizer.configuration import ViTaminConfig, layer_numbers
from vqrae.tokenizer.open_clip import (
    VITAMIN_CLIP,
    rename,
    vitamin_clip_weights,
    vitamin_config,
)
from vqrae.tokenizer.vitamin import ViTaminModel

# `model_type` of a checkpoint -> its vision class; whole image-text models give their vision part.
VISION_MODELS: dict[str, type[PreTrainedModel]] = {
    "siglip_vision_model": SiglipVisionModel,
    "siglip": SiglipVisionModel,  # google/siglip2-*-patch16-256 too; only NaFlex ones are "siglip2"
    "internvl_vision": InternVLVisionModel,
    "internvl": InternVLVisionModel,  # OpenGVLab/InternVL3-*-hf
    "vitamin": ViTaminModel,
}
# `model_type` of OpenGVLab/InternViT-300M-448px-V2_5 and the like, whatever their size
OPENGVLAB_FORMAT = "intern_vit_6b"


def load_encoder(source: str, attention: str) -> PreTrainedModel:
    """The pretrained encoder in fp32, without pooling head and without dropout.

    Args:
        source: run directory, checkpoint folder or hub id.

    Raises:
        ValueError: for another kind of model, or weights that are missing or not finite.
    """
    source = resolve_model(source)
    values, _ = PreTrainedConfig.get_config_dict(source)
    kind = values.get("model_type")
    if kind == OPENGVLAB_FORMAT:
        return _load_opengvlab(source, values, attention)
    if VITAMIN_CLIP in (values.get("architectures") or ()):
        return _load_vitamin_clip(source, values["vision_cfg"], attention)
    if kind not in VISION_MODELS:
        known = ", ".join([*VISION_MODELS, OPENGVLAB_FORMAT, VITAMIN_CLIP])
        raise ValueError(f"{source} is a {kind!r} checkpoint, expected an encoder: one of {known}")
    vision = VISION_MODELS[kind]
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    if vision is SiglipVisionModel:
        options["vision_use_head"] = False
    # Dropout would blur the target of distillation.
    for name in ("attention_dropout", "hidden_dropout_prob", "projection_dropout"):
        if hasattr(vision.config_class, name):
            options[name] = 0.0
    if kind == "internvl":
        options["key_mapping"] = {r"^(model\.)?vision_tower\.": ""}
    return load_model(vision, source, **options)


def load_text_side(source: str) -> dict[str, Tensor]:
    """Weights of a tokenizer's text side that a checkpoint holds; none in most kinds."""
    source = resolve_model(source)
    values, _ = PreTrainedConfig.get_config_dict(source)
    is_clip = VITAMIN_CLIP in (values.get("architectures") or ())
    return vitamin_clip_weights(source)[1] if is_clip else {}


def encoder_features(
    encoder: PreTrainedModel, pixel_values: Tensor, feature_tap: str, layers: Sequence[int] = ()
) -> Tensor:
    """Features (B, N, D) of a Hugging Face vision encoder at a tap, without a class token.

    Args:
        layers: more hidden states (see `layer_numbers`), appended in this order: (B, N, D * (1 +
            layers)).
    """
    numbers = layer_numbers(layers, encoder.config.num_hidden_layers)
    has_class_token = isinstance(encoder, InternVLVisionModel)
    blocks = encoder.encoder.layer if has_class_token else encoder.encoder.layers
    no_mask = (None,) if isinstance(encoder, SiglipVisionModel) else ()
    # Block by block: `output_hidden_states=True` would keep all states, and drop their gradients
    # under activation checkpointing.
    hidden = encoder.embeddings(pixel_values)
    states = {0: hidden} if 0 in numbers else {}
    for number, block in enumerate(blocks, start=1):
        hidden = block(hidden, *no_mask)
        if number in numbers:
            states[number] = hidden
    if feature_tap == "last_hidden_state":
        hidden = final_norm(encoder)(hidden)
    if layers:
        hidden = torch.cat([hidden, *(states[number] for number in numbers)], -1)
    return hidden[:, 1:] if has_class_token else hidden


def final_norm(encoder: PreTrainedModel) -> nn.Module:
    """The layer between `hidden_states[-1]` and `last_hidden_state`; the identity for InternViT."""
    return encoder.post_layernorm if isinstance(encoder, SiglipVisionModel) else encoder.layernorm


# ---- OpenGVLab's own format (remote code on the hub) -> InternVLVisionModel

SAME_VALUES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "norm_type",
)  # fmt: skip
# Theirs -> Hugging Face's; what is not named here has no part in the forward pass.
OPENGVLAB_VALUES = {
    **dict(zip(SAME_VALUES, SAME_VALUES, strict=True)),
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
OPENGVLAB_KEYS = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.([qk]_norm)\.", r".attention.\1."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)


def convert_opengvlab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of OpenGVLab's InternViT as those of `InternVLVisionModel`, with q, k, v apart."""
    converted = {}
    for key, tensor in state.items():
        key = rename(key, OPENGVLAB_KEYS)
        if ".attn.qkv." in key:
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[key.replace(".attn.qkv.", f".attention.{name}_proj.")] = part.clone()
        else:
            converted[key] = tensor
    return converted


def _load_opengvlab(source: str, values: Mapping[str, Any], attention: str) -> PreTrainedModel:
    known = {new: values[old] for old, new in OPENGVLAB_VALUES.items() if old in values}
    config = InternVLVisionConfig(**known)
    encoder = InternVLVisionModel._from_config(config, attn_implementation=attention)
    files = sorted(local_model(source).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} has no *.safetensors file")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    encoder.load_state_dict(convert_opengvlab(state))
    require_finite(encoder, source)
    return encoder


# ---- ViTamin-CLIP (remote code on the hub) -> ViTaminModel


def _load_vitamin_clip(source: str, values: Mapping[str, Any], attention: str) -> PreTrainedModel:
    config = vitamin_config(values["timm_model_name"], values["image_size"])
    config.pop("model_type")
    encoder = ViTaminModel._from_config(ViTaminConfig(**config), attn_implementation=attention)
    weights, _ = vitamin_clip_weights(source)
    # CLIP's ViTamin is normalised after its pooling: the last norm is new, as in UniTok.
    fresh = {key: tensor for key, tensor in encoder.state_dict().items() if "layernorm." in key}
    encoder.load_state_dict(fresh | weights)
    require_finite(encoder, source)
    return encoder
