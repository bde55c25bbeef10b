"""A tokenizer of Llama's own class, trained on a few sentences."""

import json
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TEXTS = [
    "a photo of a red circle left of two blue stars",
    "what color is the star ?",
    "USER: ASSISTANT: user assistant",
]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def train_llama_tokenizer(folder: Path, *, legacy: bool) -> PreTrainedTokenizerBase:
    """A folder as lmsys publishes it: tokenizer.model, read by transformers' own Llama class."""
    texts = [*TEXTS, "red circle", "and the circle ? two blue stars", VICUNA_SYSTEM]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    described = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": legacy,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return AutoTokenizer.from_pretrained(folder)
