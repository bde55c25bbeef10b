"""Words of the data that a text tokenizer lacks: named before they are trained as unknown, learned by a small vocabulary.

A released language model reads any text. Those of the embedded default know the words of the scenes; whoever trains LLaVA on
data of their own gives them the words of these data, as new rows.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqrae.common.distributed import gathered
from vqrae.data.conversations import IMAGE_TAG, ConversationTable, scan_conversations
from vqrae.data.sources import holds_conversations, source_kind, texts_of
from vqrae.data.word_tokenizer import grow_word_tokenizer, is_word_tokenizer, unknown_words
from vqrae.understanding.build import add_rows

NEW_WORDS = 8192
"""Words that a small vocabulary grows by at most: the most frequent ones."""


def texts_in(source: str) -> list[str]:
    """What is said in the conversations of a source (not a mixture), also where images are missing; nothing in any other."""
    if source_kind(source) == "json":
        return [
            turn["value"].replace(IMAGE_TAG, "")
            for r in scan_conversations(source)[0]
            for turn in r["conversations"]
        ]
    return texts_of(ConversationTable(source)) if holds_conversations(source) else []


def learn_words(text_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """The words of `texts` that a word tokenizer has now got ids for; none for any other tokenizer."""
    return (
        grow_word_tokenizer(text_tokenizer, texts, limit=NEW_WORDS)
        if is_word_tokenizer(text_tokenizer)
        else []
    )


@torch.no_grad()
def add_word_rows(model: PreTrainedModel, first: int, end: int) -> None:
    """Start the rows of the ids from `first` to `end` where the known words are: their mean, with a tenth of their spread.

    Rows that were there before, as padding, have been trained to be never chosen. The numbers depend on nothing else, so that
    a resumed run and a merged adapter find the same rows.
    """
    add_rows(model, end)
    noise = torch.Generator().manual_seed(first)
    weights = {
        id(layer.weight): layer.weight
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for weight in weights.values():
        with gathered(weight):
            known = weight[:first].float()
            rows = torch.randn(end - first, weight.shape[1], generator=noise).to(weight.device)
            weight[first:end] = (known.mean(0) + 0.1 * known.std(0) * rows).to(weight.dtype)


def describe_unknown(text_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str | None:
    """The words of `texts` that the tokenizer reads as unknown, with their share, in one line; None when there are none."""
    model = text_tokenizer.backend_tokenizer.model if text_tokenizer.is_fast else None
    if text_tokenizer.unk_token is None or model is None or getattr(model, "byte_fallback", False):
        return None
    words: Counter[str] = Counter()
    total = 0
    for text in texts:
        words.update(unknown_words(text_tokenizer, text))
        total += len(text_tokenizer(text, add_special_tokens=False)["input_ids"])
    if not words:
        return None
    shown = ", ".join(f"{word[:40]!r} ({count})" for word, count in words.most_common(8))
    return (
        f"{words.total():,} of {total:,} tokens ({words.total() / total:.1%}) are words that the text tokenizer reads as "
        f"{text_tokenizer.unk_token}, {len(words):,} different ones: {shown}"
    )
