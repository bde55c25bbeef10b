"""The unified model from a tokenizer and a language model, and its processor."""

from collections.abc import Sequence

from tokenizers import AddedToken
from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN

from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.understanding import build as understanding
from vqrae.understanding.build import AspectRatio


def build_processor(
    config: VQRAEConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[str],
    *,
    chat_template: str = "chatml",
    aspect_ratio: AspectRatio = "crop",
) -> LlavaProcessor:
    """The processor of an understanding model, whose `pixel_values` are here images in [0, 1].

    Args:
        image_tokens: BOI and EOI, added where the text tokenizer does not know them.
        aspect_ratio: `pad` adds UniTok's border, in CLIP's mean colour (122, 116, 104).
    """
    missing = [token for token in image_tokens if token not in text_tokenizer.get_vocab()]
    added = [AddedToken(token, special=True, normalized=False) for token in missing]
    text_tokenizer.add_tokens(added, special_tokens=True)
    processor = understanding.build_processor(config, text_tokenizer, chat_template, aspect_ratio)
    processor.image_processor.do_normalize = False
    processor.image_processor.image_mean = list(OPENAI_CLIP_MEAN)
    return processor
