"""What a LLaVA is made of, before any weight is there."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, PretrainedConfig

from vqrae.common.config import load_config, shipped_config
from vqrae.tokenizer import VQRAEConfig
from vqrae.tokenizer.train_config import TokenizerTrainConfig
from vqrae.understanding.build import llava_config


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
    text_config = text_architecture(architecture)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(llava_config(tokenizer, text_config, image_token_id=text_config.vocab_size - 1))


def text_architecture(architecture: Architecture) -> PretrainedConfig:
    """The language model's configuration."""
    values = dict(architecture.llm)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def count_parameters(model: LlavaForConditionalGeneration) -> dict[str, int]:
    """Parameters of encoder, projector and llm; tied ones once."""
    parts = {"encoder": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**counts, "llm": sum(p.numel() for p in model.parameters()) - sum(counts.values())}
