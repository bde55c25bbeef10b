"""The loss of the generator, the `Trainer` that minimises it, and what such a trainer is made of."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from vqrae.common.checkpoints import resolve_model
from vqrae.common.distributed import attention_implementation
from vqrae.common.trainer import WholeTrainer, build_optimizers
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import SPRITE_SETS
from vqrae.data.word_tokenizer import fit_word_tokenizer
from vqrae.generation.config import GeneratorModelConfig, TrainingConfig
from vqrae.generation.data import GenerationCollator, fill_codes
from vqrae.generation.modeling import VisualHead, build_generator
from vqrae.generation.vocabulary import PromptEncoder, VisualVocabulary


def visual_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    vocabulary: VisualVocabulary,
    *,
    full_vocabulary: bool = False,
) -> Tensor:
    """Mean cross entropy of the codes of a left-padded batch.

    The sequence ends in the N codes, so the last N + 1 positions but one predict them: no other logits are computed.

    Args:
        full_vocabulary: softmax over all rows of the head. Else over the codes, and `model.lm_head` is a `VisualHead`.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, logits_to_keep=vocabulary.num_codes + 1, use_cache=False).logits[
        :, :-1
    ]
    ids = batch["labels"][:, -vocabulary.num_codes :]
    targets = ids if full_vocabulary else vocabulary.to_codes(ids)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class GeneratorTrainer(WholeTrainer):
    """A `Trainer` whose loss is on the codes.

    Args:
        encode: images uint8 (M, 3, H, W) -> codes, for data that is not encoded yet.
    """

    def __init__(
        self,
        *args: Any,
        vocabulary: VisualVocabulary,
        full_vocabulary: bool,
        encode: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary, self.full_vocabulary, self.encode = vocabulary, full_vocabulary, encode
        # Every sample has N codes: the mean over micro-batches is the mean over tokens, no count need be passed on.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.encode is not None:
            inputs = fill_codes(inputs, self.encode, self.vocabulary)
        return visual_loss(model, inputs, self.vocabulary, full_vocabulary=self.full_vocabulary)


def build_text_tokenizer(
    config: GeneratorModelConfig, captions: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """The pretrained model's own tokenizer, or a word tokenizer for a new model.

    Args:
        captions: some of the data's, asked for in the second case only.
    """
    if config.llm is not None:
        return AutoTokenizer.from_pretrained(resolve_model(config.llm))
    scenes = [text for sprites in SPRITE_SETS.values() for text in vocabulary_texts(sprites.names)]
    return fit_word_tokenizer(scenes, captions(), size=config.offset)


def fit_prompts(
    config: GeneratorModelConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    vocabulary: VisualVocabulary,
) -> PromptEncoder:
    """The prompt encoder whose longest prompt and the codes take at most `max_length` ids.

    Raises:
        ValueError: when that leaves no room for a caption.
    """
    encode = PromptEncoder(
        text_tokenizer,
        vocabulary,
        template=config.prompt_template,
        max_caption_tokens=config.max_caption_tokens,
    )
    room = config.max_length - vocabulary.num_codes - encode.template_length
    if room < 1:
        raise ValueError(
            f"got max_length {config.max_length}, expected more than {vocabulary.num_codes} codes and the "
            f"{encode.template_length} ids of the template: set a larger model.max_length"
        )
    encode.max_caption_tokens = min(encode.max_caption_tokens, room)
    return encode


def build_model(
    config: GeneratorModelConfig,
    vocabulary: VisualVocabulary,
    encode_prompt: PromptEncoder,
    *,
    bf16: bool,
) -> Qwen3ForCausalLM:
    """The model to train, with everything that sampling needs to know in its `config`.

    Args:
        bf16: whether it is trained under bf16 autocast.
    """
    model = build_generator(
        vocabulary,
        llm=config.llm,
        llm_config=config.llm_config if config.llm is None else None,
        attention=attention_implementation(config.attention, half=bf16),
    )
    model.config.prompt_template, model.config.caption_dropout = (
        config.prompt_template,
        config.caption_dropout,
    )
    model.config.max_caption_tokens = encode_prompt.max_caption_tokens
    model.config.sampling = dataclasses.asdict(config.sampling)
    return model


def build_trainer(
    config: TrainingConfig,
    model: Qwen3ForCausalLM,
    arguments: TrainingArguments,
    stream: Dataset,
    encode_prompt: PromptEncoder,
    vocabulary: VisualVocabulary,
    *,
    callback: TrainerCallback,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> GeneratorTrainer:
    """The trainer of a generator; the head of `model` becomes a `VisualHead` where only codes take part in the softmax."""
    if not config.full_vocabulary_loss:
        model.lm_head = VisualHead(model.lm_head, vocabulary.code_rows)
    return GeneratorTrainer(
        model=model,
        args=arguments,
        train_dataset=stream,
        data_collator=GenerationCollator(encode_prompt, vocabulary),
        optimizers=build_optimizers(config.optimization, model),
        callbacks=[callback],
        vocabulary=vocabulary,
        full_vocabulary=config.full_vocabulary_loss,
        encode=encode,
    )
