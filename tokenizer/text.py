"""The text tokenizer of a contrastive training."""

from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vqrae.common.checkpoints import resolve_model
from vqrae.data.sources import open_captioned, texts_of
from vqrae.data.word_tokenizer import END, fit_word_tokenizer
from vqrae.tokenizer.config import ModelConfig, TokenizerTrainConfig

MAX_WORDS = 16_384  # with an id of their own, where the configuration does not say


def build_text_tokenizer(config: TokenizerTrainConfig) -> PreTrainedTokenizerBase | None:
    """What reads the captions of a run; None for one without a text side.

    Raises:
        ValueError: when no caption is found in the data.
    """
    values = config.model.text_config
    if values is None:
        return None
    # No image is read.
    pairs = open_captioned(config.data.train, image_size=64, seed=config.seed)
    pretrained = config.model.text_tokenizer
    captions = texts_of(pairs, 100 if pretrained else 20_000)
    if not captions:
        raise ValueError(
            f"data.train: {config.data.train} has no captions, expected some for "
            "contrastive_weight: give scenes, emoji, a .jsonl of image and caption, a .tar of "
            "KEY.jpg and KEY.txt, or hf:NAME, or set contrastive_weight=0 and model.text_config="
        )
    if pretrained:
        text_tokenizer = AutoTokenizer.from_pretrained(resolve_model(pretrained))
    else:
        size = values.get("vocab_size", MAX_WORDS)
        text_tokenizer = fit_word_tokenizer([], captions, size=size, end_with=END)
    text_tokenizer.model_max_length = values.get("max_position_embeddings", 77)
    return text_tokenizer


def with_text_ids(model: ModelConfig, text_tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """The model with the ids of a text tokenizer in its `text_config`.

    Raises:
        ValueError: when there are more ids than rows.
    """
    assert model.text_config is not None
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, Any] = {name: getattr(text_tokenizer, name) for name in names}
    values = {"vocab_size": len(text_tokenizer), **model.text_config, **ids}
    if values["vocab_size"] < len(text_tokenizer):
        raise ValueError(
            f"model.text_config.vocab_size: got {values['vocab_size']}, expected at least the "
            f"{len(text_tokenizer)} ids of {model.text_tokenizer}"
        )
    return replace(model, text_config=values)
