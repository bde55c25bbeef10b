"""How text and images share one vocabulary, and how a prompt becomes ids.

Ids below `offset` are text (the language model's own), then come one id per code, then BOI, the beginning of an image:

    prompt: template with the caption | BOI | code_0 … code_{N-1} in raster order

`offset` is a number in the config and never the length of the text tokenizer: adding a text token moves no visual id.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vqrae.data.word_tokenizer import unknown_words

ROW_MULTIPLE = (
    128  # embedding rows are rounded up to this: tensor-core friendly, divisible among processes
)


@dataclass(frozen=True, kw_only=True)
class VisualVocabulary:
    """Where the visual ids lie: code c has id `offset + c`."""

    offset: int
    """First visual id; at least the number of text ids (151,936 for Qwen3-0.6B)."""
    codebook_size: int
    num_codes: int
    """Codes of one image, N."""

    def __post_init__(self) -> None:
        if min(self.offset, self.codebook_size, self.num_codes) < 1:
            raise ValueError(f"got {self}, expected positive numbers")

    @property
    def begin_of_image(self) -> int:
        """Id of BOI, the token after which the first code is predicted."""
        return self.offset + self.codebook_size

    @property
    def num_rows(self) -> int:
        """Rows of the embedding: text, codes and BOI, rounded up; the rows above BOI are never used."""
        return -(-(self.begin_of_image + 1) // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def code_rows(self) -> slice:
        """Rows of embedding and head that belong to codes."""
        return slice(self.offset, self.offset + self.codebook_size)

    def to_ids(self, codes: Tensor) -> Tensor:
        """Codes -> token ids, any shape."""
        return codes + self.offset

    def to_codes(self, ids: Tensor) -> Tensor:
        """Token ids -> codes, any shape."""
        return ids - self.offset


class PromptEncoder:
    """Caption -> ids of a prompt that ends in BOI.

    Args:
        template: text around `{caption}`, e.g. a chat turn; the empty caption is the unconditional prompt.
        max_caption_tokens: longer captions lose their end (the template never does).

    Raises:
        ValueError: when the template has not exactly one `{caption}`, or text ids reach into the visual ones.
    """

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        *,
        template: str = "{caption}",
        max_caption_tokens: int = 448,
    ) -> None:
        if template.count("{caption}") != 1:
            raise ValueError(
                f"got prompt_template {template!r}, expected text with {{caption}} once"
            )
        if len(text_tokenizer) > vocabulary.offset:
            raise ValueError(
                f"the text tokenizer has {len(text_tokenizer)} ids, but visual ids start at {vocabulary.offset}: "
                "set a larger offset"
            )
        self.text_tokenizer, self.max_caption_tokens = text_tokenizer, max_caption_tokens
        before, after = template.split("{caption}")
        self._before = self._ids(before)
        self._after = [*self._ids(after), vocabulary.begin_of_image]

    def _ids(self, text: str, **options: bool) -> list[int]:
        return (
            self.text_tokenizer(text, add_special_tokens=False, **options)["input_ids"]
            if text
            else []
        )

    def __call__(self, caption: str) -> list[int]:
        """Ids of one prompt. Special tokens that a caption happens to spell are read as plain text."""
        caption_ids = self._ids(caption, split_special_tokens=True)[: self.max_caption_tokens]
        return [*self._before, *caption_ids, *self._after]

    def losses(self, caption: str) -> list[str]:
        """What the ids of a caption do not hold, in words: each entry is one sentence for people."""
        found = []
        if unknown := list(dict.fromkeys(unknown_words(self.text_tokenizer, caption))):
            found.append(
                f"{len(unknown)} words have no id and are read as unknown: {_some(unknown)}"
            )
        length = len(self._ids(caption, split_special_tokens=True))
        if length > self.max_caption_tokens:
            found.append(
                f"its end is cut: {length:,} tokens, of which {self.max_caption_tokens} are read"
            )
        return found

    @property
    def template_length(self) -> int:
        """Ids of a prompt that are not the caption's, BOI among them."""
        return len(self._before) + len(self._after)

    @property
    def unconditional(self) -> list[int]:
        """The prompt of the empty caption."""
        return self("")


def _some(words: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return ", ".join(word[:40] for word in words[:shown]) + more


def pad_left(rows: Sequence[Sequence[int]], fill: int) -> list[list[int]]:
    """Rows of one length, filled at the front, so that every prompt ends at the same place."""
    longest = max(len(row) for row in rows)
    return [[fill] * (longest - len(row)) + list(row) for row in rows]
