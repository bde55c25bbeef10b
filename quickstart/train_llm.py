"""Pretrain the small language model of the embedded default on the text of scenes, without images.

    python -m vqrae.quickstart.train_llm tiny_llm output_dir=OUT [key=value …]

It learns what a downloaded LLM already knows: words, the chat format, and answering from context,
which is a caption here and an image in LLaVA. `OUT/model` is a plain `Qwen3ForCausalLM` folder.

Qwen3 and not Qwen2: for a folder of type qwen2, `AutoTokenizer` of transformers 5 takes Qwen2's own
class whatever the folder says, and would read our word tokenizer as a byte-level one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, set_seed

from vqrae.common import run as runs
from vqrae.common.cli import parse
from vqrae.common.distributed import attention_implementation
from vqrae.common.errors import run_main
from vqrae.common.trainer import (
    IGNORE_INDEX,
    InstrumentCallback,
    OptimizationConfig,
    WholeTrainer,
    build_optimizers,
    check_launch,
    run_trainer,
    save_model,
    training_arguments,
)
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import SPRITE_SETS, load_sprites
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.understanding.conversation import load_template, pad
from vqrae.understanding.train import print_parameters

VOCABULARY_MULTIPLE = 64  # matrix shapes that kernels like; also leaves room for added tokens


@dataclass(frozen=True, kw_only=True)
class TinyLLMConfig(runs.RunConfig):
    """One run."""

    optimization: OptimizationConfig
    model: dict[str, Any]
    """`Qwen3Config` values; the vocabulary size comes from the text tokenizer."""
    sprites: list[str] = field(default_factory=lambda: list(SPRITE_SETS))
    """Sprites whose words the model knows."""
    attn_implementation: str = "auto"


class SceneText(Dataset):
    """Index -> chat messages about a scene: dialogues, and in one of four cases a caption.

    A dialogue starts with the description, in the place of LLaVA's image.
    """

    def __init__(self, sprites: Sequence[str], *, seed: int = 0) -> None:
        self.scenes = [SceneDataset(sprites=name, seed=seed) for name in sprites]

    def __len__(self) -> int:
        return len(self.scenes[0])

    def __getitem__(self, index: int) -> list[dict[str, str]]:
        scenes = self.scenes[index % len(self.scenes)]
        if index // len(self.scenes) % 4 == 0:
            return [{"role": "assistant", "content": scenes.caption(index)}]
        messages = []
        context = scenes.description(index) + "\n"
        for question in scenes.questions(index):
            messages.append({"role": "user", "content": context + question.text})
            messages.append({"role": "assistant", "content": question.answer})
            context = ""
        return messages


class TextCollator:
    """Chat messages -> right-padded batch in which every token is trained."""

    def __init__(self, text_tokenizer: PreTrainedTokenizerBase) -> None:
        self.text_tokenizer = text_tokenizer

    def __call__(self, chats: Sequence[list[dict[str, str]]]) -> dict[str, Tensor]:
        """Batch of input_ids, attention_mask and labels, all (B, T)."""
        encoded = self.text_tokenizer.apply_chat_template(
            list(chats), tokenize=True, return_dict=True
        )
        rows = [torch.tensor(ids) for ids in encoded["input_ids"]]
        return {
            "input_ids": pad(rows, self.text_tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in rows], 0),
            "labels": pad(rows, IGNORE_INDEX),
        }


def build_tiny_llm(config: TinyLLMConfig) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """A language model with random weights, and its word tokenizer with the chatml template."""
    names: list[str] = []
    for sprites in config.sprites:
        names += load_sprites(sprites).names
    text_tokenizer = build_word_tokenizer(vocabulary_texts(names))
    text_tokenizer.chat_template = load_template("chatml")
    half = config.optimization.bf16
    qwen = Qwen3Config(
        vocab_size=-(-len(text_tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        bos_token_id=None,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        attn_implementation=attention_implementation(config.attn_implementation, half=half),
        **config.model,
    )
    return Qwen3ForCausalLM(qwen), text_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Command line: CONFIG [key.path=value …]."""
    config = parse(TinyLLMConfig, argv, package="vqrae.quickstart")
    optimization, output = config.optimization, Path(config.output_dir)
    run = runs.open(output, config, seed=config.seed, report_to=config.report_to)
    if run.finished(optimization.max_steps):
        return
    check_launch(optimization, output)
    run.begin()
    set_seed(config.seed)
    model, text_tokenizer = build_tiny_llm(config)
    print_parameters(model)
    # The loss is Qwen3ForCausalLM's own, over all tokens.
    trainer = WholeTrainer(
        model=model,
        args=training_arguments(optimization, output, seed=config.seed),
        train_dataset=SceneText(config.sprites, seed=config.seed),
        data_collator=TextCollator(text_tokenizer),
        processing_class=text_tokenizer,
        optimizers=build_optimizers(optimization, model),
        callbacks=[InstrumentCallback(run, "llm")],
    )
    run_trainer(trainer)
    save_model(trainer, output / "model")


if __name__ == "__main__":
    run_main(main)
