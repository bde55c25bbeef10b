"""The unified model at work: it answers as a `Chat` and makes images as a `Generator`.

    open_chat(name), open_generator(name)

open whatever a folder holds: the unified model, or one that does only this.
"""

import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from vqrae.common.checkpoints import load_model, local_model, require_kind, resolve_model
from vqrae.common.distributed import choose_device
from vqrae.generation.data import encode_images, load_frozen_tokenizer
from vqrae.generation.generator import Generator
from vqrae.generation.own_tokenizer import own_tokenizer
from vqrae.mllm.build import image_prompt
from vqrae.mllm.modeling import UnifiedConfig, UnifiedModel
from vqrae.mllm.sequences import ImagePrompt
from vqrae.understanding.chat import Chat, precision


class UnifiedGenerator(Generator):
    """Text to image with the unified model."""

    kinds: ClassVar[dict[str, Any]] = {UnifiedConfig.model_type: UnifiedModel}

    @staticmethod
    def prompt_encoder(
        config: PreTrainedConfig, text_tokenizer: PreTrainedTokenizerBase
    ) -> ImagePrompt:
        return image_prompt(config, text_tokenizer)


class UnifiedChat(Chat):
    """Questions about images, of which the unified model sees the codes."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> "UnifiedChat":
        """Load a model and its visual tokenizer; see `Chat.from_pretrained`.

        Args:
            tokenizer: the visual tokenizer, where it has moved since training.
            options: `dtype` and `attn_implementation`.
        """
        folder, device = resolve_model(name), choose_device(device)
        values = require_kind(folder, (UnifiedConfig.model_type,), "a unified model")
        folder = str(local_model(folder))  # of a hub id: its tokenizer is a folder inside
        encoder = load_frozen_tokenizer(own_tokenizer(folder, values, tokenizer)).to(device)
        chosen = precision(values, device, **options)
        model = load_model(UnifiedModel, folder, **chosen).to(device)
        model.encode_images = functools.partial(encode_images, encoder)
        processor = AutoProcessor.from_pretrained(folder)
        return cls(model, processor, max_new_tokens=max_new_tokens)


def open_chat(name: str | Path, **options: Any) -> Chat:
    """What answers questions with the model of that name; options of `from_pretrained`."""
    kind = UnifiedChat if is_unified(name) else Chat
    return kind.from_pretrained(name, **options)


def open_generator(name: str | Path, **options: Any) -> Generator:
    """What makes images with the model of that name; options of `from_pretrained`."""
    kind = UnifiedGenerator if is_unified(name) else Generator
    return kind.from_pretrained(name, **options)


def is_unified(name: str | Path) -> bool:
    """Whether a run directory, model folder or hub id holds a unified model."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(resolve_model(name))
    except OSError:  # the class that opens other models says what is wrong
        return False
    return values.get("model_type") == UnifiedConfig.model_type
