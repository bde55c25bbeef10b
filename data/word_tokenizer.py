"""A word-level text tokenizer for small language models, as a plain Hugging Face tokenizer."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD = "<|endoftext|>"  # these are the names that Qwen uses
UNKNOWN = "<|unk|>"
START = "<|im_start|>"
END = "<|im_end|>"
IMAGE = "<image>"
ROLES = ["system", "user", "assistant"]


def build_word_tokenizer(
    texts: Sequence[str], *, end_with: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the words and punctuation marks of `texts`.

    It has chatml's special tokens and `<image>`; text is lower-cased, unknown words become
    `<|unk|>`, padding is `<|endoftext|>`. `end_with` is a special token at the end of every encoded
    text (SigLIP pools its last token).
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.WordLevelTrainer(
        special_tokens=[PAD, UNKNOWN, START, END, IMAGE],
        vocab_size=1 << 20,  # no limit: each word gets an id
        min_frequency=1,
        show_progress=False,
    )
    # Sorted, so that the same words always get the same ids.
    tokenizer.train_from_iterator(sorted({*texts, " ".join(ROLES), *"0123456789"}), trainer)
    if end_with:
        end = (end_with, tokenizer.token_to_id(end_with))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end_with}", special_tokens=[end]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[START, IMAGE],
        padding_side="right",
    )


def fit_word_tokenizer(
    texts: Sequence[str], captions: Iterable[str], *, size: int, end_with: str | None = None
) -> PreTrainedTokenizerFast:
    """At most `size` ids: for all words of `texts`, then for the most frequent of `captions`.

    Args:
        end_with: see `build_word_tokenizer`.
    """
    base = build_word_tokenizer(texts)
    words = _new_words(base, captions)
    kept = _most_frequent(words, max(0, size - len(base)))
    if len(kept) < len(words):
        share = 1 - sum(words[word] for word in kept) / words.total()
        print(
            f"{len(words) - len(kept)} of {len(words) + len(base)} words have no id and become "
            f"{UNKNOWN}, {share:.0%} of the words of the captions: only {size} ids fit",
            file=sys.stderr,
            flush=True,
        )
    return build_word_tokenizer([*texts, *kept], end_with=end_with)


def _new_words(text_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[str]:
    """The words of texts that a word tokenizer has no id for, and how often they occur."""
    known, backend = text_tokenizer.get_vocab(), text_tokenizer.backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        split = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        words.update(word for word, _ in split if word not in known)
    return words


def _most_frequent(words: Counter[str], limit: int) -> list[str]:
    """Up to `limit` words; ties in alphabetical order."""
    return sorted(words, key=lambda word: (-words[word], word))[:limit]


def is_word_tokenizer(text_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text tokenizer is one of this module, with an id for each word."""
    return text_tokenizer.is_fast and isinstance(
        text_tokenizer.backend_tokenizer.model, models.WordLevel
    )


def grow_word_tokenizer(
    text_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, limit: int
) -> list[str]:
    """Give new ids, in place, to the `limit` most frequent unknown words of `texts`; returns these
    words.

    Texts and limit alone decide their order.
    """
    words = _most_frequent(_new_words(text_tokenizer, texts), limit)
    if words:
        vocabulary = text_tokenizer.get_vocab()
        vocabulary |= {word: i for i, word in enumerate(words, len(text_tokenizer))}
        text_tokenizer.backend_tokenizer.model = models.WordLevel(
            vocabulary, unk_token=text_tokenizer.unk_token
        )
    return words


def unknown_words(text_tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text that become the unknown token, as often as they occur.

    Nothing for a tokenizer without such a token, or a slow one, which does not tell where tokens
    are from.
    """
    unknown = text_tokenizer.unk_token_id
    if unknown is None or not text_tokenizer.is_fast:
        return []
    encoded = text_tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [text[start:end] for token, (start, end) in places if token == unknown]


def describe_unknown(text_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str | None:
    """The words of `texts` that a tokenizer reads as unknown, with their share, or None."""
    model = text_tokenizer.backend_tokenizer.model if text_tokenizer.is_fast else None
    # Byte fallback spells what has no id.
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
        f"{words.total():,} of {total:,} tokens ({words.total() / total:.1%}) are words that the "
        f"text tokenizer reads as {text_tokenizer.unk_token}, "
        f"{len(words):,} different ones: {shown}"
    )
