"""Weights under the names of timm's ViTamin and open_clip's text tower, which UniTok's checkpoint
and the ViTamin-CLIP models on the hub (jienengchen/ViTamin-L-256px) share.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqrae.common.checkpoints import local_model

Rules = Sequence[tuple[str, str]]

# In the `architectures` of the hub's models, whose config.json has no `model_type`.
VITAMIN_CLIP = "ViTaminCLIP"
# Width, depth, heads and the widths of both convolutional stages, by the name in timm's models.
VITAMIN_SIZES = {
    "small": (384, 14, 6, (64, 128)),
    "base": (768, 14, 12, (128, 256)),
    "large": (1024, 31, 16, (160, 320)),
    "xlarge": (1152, 32, 16, (192, 384)),
}
VITAMIN_KEYS = (  # timm's names -> those of `ViTaminModel`
    (r"^patch_embed\.backbone\.", "embeddings."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "layernorm."),
)
TEXT_KEYS = (  # open_clip's names -> those of `CLIPTextModel`
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def rename(key: str, rules: Rules) -> str:
    """The key after all replacements of regular expressions, one after the other."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def vitamin_config(name: str, image_size: int) -> dict[str, Any]:
    """Values of `ViTaminConfig`, with its `model_type`, of a model that timm names so.

    Raises:
        ValueError: for another kind of model.
    """
    match = re.match(rf"vitamin_({'|'.join(VITAMIN_SIZES)})", name)
    if match is None:
        known = ", ".join(VITAMIN_SIZES)
        raise ValueError(f"got timm model {name!r}, expected a vitamin_ of size {known}")
    width, depth, heads, stem_widths = VITAMIN_SIZES[match[1]]
    return {
        "model_type": "vitamin",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "stem_widths": list(stem_widths),
        "image_size": image_size,
    }


def convert_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip's text tower as those of a tokenizer's text side."""
    converted = {}
    for key, tensor in state.items():
        if key == "text_projection":
            converted["text_projection.weight"] = tensor.T.contiguous()
            continue
        key = "text_model." + rename(key, TEXT_KEYS)
        if match := re.fullmatch(r"(.*\.self_attn\.)in_proj_(weight|bias)", key):
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{match[1]}{name}_proj.{match[2]}"] = part.clone()
        else:
            converted[key] = tensor
    return converted


def load_weights(file: Path, expected: str) -> Any:
    """What a `torch.save` file holds, without running code that it may carry.

    Args:
        expected: what the file should hold, for the message.

    Raises:
        ValueError: for a file that is damaged or holds more than tensors and plain values.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: {reason} Expected {expected}") from error


def vitamin_clip_weights(source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and text side of a ViTamin-CLIP checkpoint, under the names of this package.

    Without the head of images, the positions, which UniTok does not use, and the scale.
    """
    folder = local_model(source)
    state = load_weights(folder / "pytorch_model.bin", "the weights of a ViTamin-CLIP model")
    vision, text = {}, {}
    for key, tensor in state.items():
        if re.match(r"visual\.trunk\.(?!pos_embed$|head\.|fc_norm\.)", key):
            vision[rename(key.removeprefix("visual.trunk."), VITAMIN_KEYS)] = tensor
        elif key.startswith("text."):
            text[key.removeprefix("text.")] = tensor
    return vision, convert_text(text)
