"""Tiny random parts: a language model with the word tokenizer, text tokenizers, short trainings."""

from collections.abc import Callable

import pytest
import torch
from llama_tokenizer import TEXTS, train_llama_tokenizer
from llava_trainings import STEPS
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vqrae.understanding import train
from vqrae.understanding.build import build_llava


@pytest.fixture
def fresh_llava(tokenizer_folder, llm_folder):
    """A fresh model and its processor."""
    torch.manual_seed(0)
    return build_llava(tokenizer_folder, llm_folder)


@pytest.fixture
def launch(tokenizer_folder, llm_folder, tmp_path) -> Callable[..., dict[str, Tensor]]:
    """Train in `tmp_path/RUN` for a number of steps in each stage; returns the finished weights."""

    def run(run: str, steps: int, *more: str, **options: object) -> dict[str, Tensor]:
        folder = tmp_path / run
        options = {"tokenizer": tokenizer_folder, "llm": llm_folder, **options}
        given = [f"{key}={value}" for key, value in options.items()]
        for stage in train.STAGES:
            values = {**STEPS, "max_steps": steps}
            given += [f"{stage}.{key}={value}" for key, value in values.items()]
        train.main(["tiny", f"output_dir={folder}", *given, *more])
        stage = "pretrain" if options.get("stage") == "pretrain" else "sft"
        return load_file(folder / train.MODEL_FOLDERS[stage] / "model.safetensors")

    return run


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


@pytest.fixture(name="train_llama_tokenizer")
def train_llama_tokenizer_fixture(tmp_path) -> Callable[[bool], PreTrainedTokenizerBase]:
    return lambda legacy: train_llama_tokenizer(tmp_path, legacy=legacy)
