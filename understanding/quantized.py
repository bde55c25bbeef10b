"""LLaVA on quantized features, for one comparison only: what does understanding lose when it sees what the codes keep?

VQRAE's claim is that a tokenizer should show continuous features to the language model and give codes to the generator (arXiv
2511.23386, section 3.4). The weights and the folder stay those of a plain LLaVA; the features change on their way into the
projector, so whoever opens such a folder must quantize them as well: `Chat.from_pretrained(…, tokenizer=…)` does.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vqrae.common.checkpoints import local_model
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.build import require_tokenizer

FEATURES_KEY = "vqrae_features"
QUANTIZED = "quantized"


def read_quantized_features(model: PreTrainedModel, tokenizer_folder: str | Path) -> None:
    """Let the projector read what the decoder reads: quantized features, in the width of the continuous ones.

    Raises:
        ValueError: when the model was built on another tokenizer.
    """
    require_tokenizer(model.config, tokenizer_folder, "the model")
    tokenizer = (
        VQRAEModel.from_pretrained(local_model(tokenizer_folder)).eval().requires_grad_(False)
    )

    def quantize(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        [features_BND] = args
        tokenizer.to(features_BND.device)
        with torch.no_grad(), torch.autocast(features_BND.device.type, enabled=False):
            quantized_BND = tokenizer.out_proj(
                tokenizer.quantizer(tokenizer.project(features_BND)).quantized
            )
        return (quantized_BND.to(features_BND.dtype),)

    model.model.multi_modal_projector.register_forward_pre_hook(quantize)
    setattr(model.config, FEATURES_KEY, QUANTIZED)


def is_quantized(config: Any) -> bool:
    """Whether a model was trained on quantized features."""
    return getattr(config, FEATURES_KEY, None) == QUANTIZED
