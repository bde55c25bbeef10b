"""The unified model from a tokenizer and a language model, and its processor."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import OPENAI_CLIP_MEAN

from vqrae.common.checkpoints import load_model, resolve_model
from vqrae.data.word_tokenizer import grow_word_tokenizer, is_word_tokenizer
from vqrae.generation.multi_code import projection_of
from vqrae.mllm.config import MLLMConfig
from vqrae.mllm.modeling import UnifiedConfig, UnifiedModel
from vqrae.mllm.sequences import PROMPT, UNCONDITIONAL, ImagePrompt, ImageVocabulary
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding import build as understanding
from vqrae.understanding.build import AspectRatio, add_word_rows, end_token

NEW_WORDS = 8192  # a small vocabulary grows by at most the most frequent ones


def build_model(
    config: MLLMConfig, tokenizer: VQRAEModel, texts: Sequence[str], *, attention: str
) -> tuple[UnifiedModel, LlavaProcessor]:
    """A pretrained language model, a depth head with random weights, and the tokenizer's codebooks.

    Args:
        texts: of the data; a word tokenizer gets ids for their words.
        attention: the implementation.
    """
    optimization, name = config.optimization, resolve_model(config.llm)
    # Without DeepSpeed's master weights the optimizer works on the weights themselves.
    half = optimization.bf16 and optimization.zero
    dtype = torch.bfloat16 if half else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    llm = load_model(AutoModelForCausalLM, name, **options)
    llm.config._name_or_path = ""  # else a path of this machine gets into the model's config.json
    text_tokenizer = AutoTokenizer.from_pretrained(name)
    first = len(text_tokenizer)
    if is_word_tokenizer(text_tokenizer):
        grow_word_tokenizer(text_tokenizer, [PROMPT, UNCONDITIONAL, *texts], limit=NEW_WORDS)
    add_image_tokens(text_tokenizer, config.image_tokens)
    if len(text_tokenizer) > first:
        add_word_rows(llm, first, len(text_tokenizer))
    processor = build_processor(
        tokenizer.config,
        text_tokenizer,
        config.image_tokens,
        chat_template=config.chat_template,
        aspect_ratio=config.aspect_ratio,
    )
    values = unified_config(config, tokenizer, processor, llm.config)
    model = UnifiedModel._from_config(values, llm=llm, **options)
    model.embedding.start_from(tokenizer.code_vectors(), tokenizer.out_proj)
    return model, processor


def unified_config(
    config: MLLMConfig,
    tokenizer: VQRAEModel,
    processor: LlavaProcessor,
    llm_config: PreTrainedConfig,
) -> UnifiedConfig:
    """What a model's `config.json` holds, but for the place of its tokenizer."""
    text_tokenizer = processor.tokenizer
    end = end_token(text_tokenizer, config.chat_template)
    llm_config.eos_token_id = text_tokenizer.convert_tokens_to_ids(end)
    llm_config.pad_token_id = text_tokenizer.pad_token_id
    boi, eoi = text_tokenizer.convert_tokens_to_ids(list(config.image_tokens))
    vocabulary = ImageVocabulary(
        offset=boi,
        codebook_size=tokenizer.config.codebook_size,
        num_codes=tokenizer.config.grid_size**2,
        num_codebooks=tokenizer.config.num_codebooks,
    )
    left_out = ("architectures", "dtype", "transformers_version")
    llm_values = llm_config.to_diff_dict()
    values = UnifiedConfig(
        image_token_id=processor.image_token_id,
        end_of_image=eoi,
        visual_vocabulary=asdict(vocabulary),
        max_caption_tokens=config.max_caption_tokens,
        num_codebooks=vocabulary.num_codebooks,
        codebook_size=vocabulary.codebook_size,
        projection=projection_of(tokenizer),
        head=asdict(config.depth),
        llm_config={key: value for key, value in llm_values.items() if key not in left_out},
    )
    # What inference needs to know.
    values.caption_dropout, values.sampling = config.caption_dropout, asdict(config.sampling)
    return values


def image_prompt(config: UnifiedConfig, text_tokenizer: PreTrainedTokenizerBase) -> ImagePrompt:
    """How a model is asked for an image."""
    vocabulary = ImageVocabulary(**config.visual_vocabulary)
    return ImagePrompt(text_tokenizer, vocabulary, max_tokens=config.max_caption_tokens)


def build_processor(
    config: VQRAEConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[str],
    *,
    chat_template: str = "chatml",
    aspect_ratio: AspectRatio = "crop",
) -> LlavaProcessor:
    """The processor of an understanding model, whose `pixel_values` are here images of 8 bits.

    Args:
        image_tokens: BOI and EOI, added where the text tokenizer does not know them.
        aspect_ratio: `pad` adds UniTok's border, in CLIP's mean colour (122, 116, 104).
    """
    add_image_tokens(text_tokenizer, image_tokens)
    processor = understanding.build_processor(config, text_tokenizer, chat_template, aspect_ratio)
    processor.image_processor.do_rescale = processor.image_processor.do_normalize = False
    processor.image_processor.image_mean = list(OPENAI_CLIP_MEAN)
    return processor


def add_image_tokens(text_tokenizer: PreTrainedTokenizerBase, image_tokens: Sequence[str]) -> None:
    """Give BOI and EOI ids, where they have none."""
    missing = [token for token in image_tokens if token not in text_tokenizer.get_vocab()]
    added = [AddedToken(token, special=True, normalized=False) for token in missing]
    text_tokenizer.add_tokens(added, special_tokens=True)
