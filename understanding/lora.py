"""LoRA as in LLaVA-1.5: adapters on every linear layer of the language model, while the projector is trained as a whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from vqrae.common.config import check_range

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Defaults are those of LLaVA-1.5's `finetune_lora.sh`."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    learning_rate: float = 2e-4
    """Of the adapters, instead of sft.learning_rate."""
    projector_learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        check_range(self, "rank", "alpha", low=1)
        check_range(self, "dropout", low=0, high=1)
        check_range(self, "learning_rate", "projector_learning_rate", low=0)


def add_lora(model: LlavaForConditionalGeneration, settings: LoraSettings) -> "PeftModel":
    """Freeze everything but new adapters and the projector.

    Adapters and projector are float32, whatever the rest is, for the optimizer works on them.
    """
    from peft import LoraConfig, get_peft_model

    layers = {
        name.rpartition(".")[2]
        for name, m in model.model.language_model.named_modules()
        if isinstance(m, nn.Linear)
    }
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(layers))})",
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def merge_lora(
    model: LlavaForConditionalGeneration, adapter: str | Path
) -> LlavaForConditionalGeneration:
    """The model that the adapter in a folder was trained on -> an ordinary model with the adapter in its weights.

    The sum is made in float32: in bfloat16 most of a small update would be rounded away twice.
    """
    from peft import PeftModel

    dtype = model.dtype
    return (
        PeftModel.from_pretrained(model.to(torch.float32), str(adapter))
        .merge_and_unload()
        .to(dtype)
    )
