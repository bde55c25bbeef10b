"""What a LLaVA run needs, before any weight is there: parameters by part, and memory per GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from vqrae.common.config import load_config, shipped_config
from vqrae.tokenizer import VQRAEConfig
from vqrae.tokenizer.train_config import TokenizerTrainConfig
from vqrae.understanding.build import llava_config

GIB = 2**30
# Bytes of a parameter: bfloat16 weight and gradient; float32 master weight and AdamW's two moments.
WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the parts of a LLaVA are, where their weights are not at hand."""

    tokenizer: str
    """A name in tokenizer/configs, or a YAML file."""
    llm: dict[str, Any]
    """Hugging Face configuration of the language model, with its `model_type`; vocab_size counts `<image>`, rounded up."""


def empty_llava(architecture: Architecture) -> LlavaForConditionalGeneration:
    """The model on the meta device: every shape, no weight."""
    shipped = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", architecture.tokenizer))
    tokenizer = VQRAEConfig(encoder_config=shipped.model.encoder_config)
    values = dict(architecture.llm)
    text_config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(llava_config(tokenizer, text_config, image_token_id=text_config.vocab_size - 1))


def count_parameters(model: LlavaForConditionalGeneration) -> dict[str, int]:
    """Parameters of encoder, projector and llm; tied ones once."""
    parts = {"encoder": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**counts, "llm": sum(p.numel() for p in model.parameters()) - sum(counts.values())}


def state_bytes(all_parameters: int, trained: int, *, zero: int, gpus: int) -> float:
    """Bytes of weights, gradients and optimizer on each GPU under bf16 and ZeRO; activations come on top.

    ZeRO-1 spreads the optimizer, ZeRO-2 the gradients as well, ZeRO-3 the weights too.
    """
    share = [gpus if zero >= stage else 1 for stage in (3, 2, 1)]
    parts = (all_parameters * WEIGHT, trained * GRADIENT, trained * OPTIMIZER)
    return sum(size / split for size, split in zip(parts, share, strict=True))
