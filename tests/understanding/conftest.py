"""Tiny random parts: a language model with the word tokenizer, and two text tokenizers trained in place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vqrae.common.config import load_config, shipped_config
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm

TEXTS = [
    "a photo of a red circle left of two blue stars",
    "what color is the star ?",
    "USER: ASSISTANT: user assistant",
]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. "
)


def train_llama_tokenizer(folder: Path, *, legacy: bool) -> PreTrainedTokenizerBase:
    """A folder as lmsys publishes it: sentencepiece's tokenizer.model, read by transformers' own Llama class."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [*TEXTS, "red circle", "and the circle ? two blue stars", VICUNA_SYSTEM] * 20
        ),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    described = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": legacy,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described | special))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(name="train_llama_tokenizer")
def train_llama_tokenizer_fixture() -> Callable[..., PreTrainedTokenizerBase]:
    return train_llama_tokenizer


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory) -> Path:
    """Random Qwen3 with the word tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    small = [
        f"model.{key}"
        for key in ("hidden_size=32", "num_hidden_layers=2", "intermediate_size=64", "head_dim=8")
    ]
    torch.manual_seed(0)
    model, text_tokenizer = build_tiny_llm(
        load_config(TinyLLMConfig, shipped_config("vqrae.quickstart", "tiny_llm"), small)
    )
    model.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen's, without `<image>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        eos_token=specials[2],
        extra_special_tokens=[specials[1]],
    )


@pytest.fixture(scope="session")
def vicuna_like() -> PreTrainedTokenizerFast:
    """BPE over metaspaces that puts `<s>` in front, as Llama's; no padding token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "abcdefghijklmnopqrstuvwxyz A chat. ?:,'"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
