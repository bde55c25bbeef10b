"""A word-level text tokenizer for the small language models of the embedded default, as a plain Hugging Face tokenizer."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, UNKNOWN, START, END, IMAGE = (
    "<|endoftext|>",
    "<|unk|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
)
ROLES = ["system", "user", "assistant"]


def build_word_tokenizer(
    texts: Sequence[str], *, end_with: str | None = None
) -> PreTrainedTokenizerFast:
    """Fit a tokenizer whose vocabulary is the words and punctuation marks of `texts`.

    Args:
        end_with: a special token put behind every encoded text (SigLIP pools its last token); None adds nothing.

    Returns:
        A fast tokenizer with chatml's special tokens and `<image>`; text is lower-cased, unknown words become
        `<|unk|>`, padding is `<|endoftext|>`.
    """
    specials = [PAD, UNKNOWN, START, END, IMAGE]
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
        special_tokens=specials, vocab_size=1 << 20, min_frequency=1, show_progress=False
    )
    # Sorted, so that the same words always get the same ids.
    tokenizer.train_from_iterator(sorted({*texts, " ".join(ROLES), *"0123456789"}), trainer)
    if end_with:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end_with}", special_tokens=[(end_with, tokenizer.token_to_id(end_with))]
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
    texts: Sequence[str], captions: Iterable[str], *, size: int
) -> PreTrainedTokenizerFast:
    """A word tokenizer of at most `size` ids: all words of `texts`, then the most frequent ones of `captions`."""
    base = build_word_tokenizer(texts)
    known, words = base.get_vocab(), _new_words(base, captions)
    kept = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))][
        : max(0, size - len(known))
    ]
    if len(kept) < len(words):
        share = 1 - sum(words[word] for word in kept) / words.total()
        print(
            f"{len(words) - len(kept)} of {len(words) + len(known)} words have no id and become {UNKNOWN}, {share:.0%} of the "
            f"words outside of the scenes' language: only {size} ids fit",
            file=sys.stderr,
            flush=True,
        )
    return build_word_tokenizer([*texts, *kept])


def _new_words(text_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[str]:
    """The words of texts that a word tokenizer has no id for, and how often they occur."""
    known, backend = text_tokenizer.get_vocab(), text_tokenizer.backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        split = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        words.update(word for word, _ in split if word not in known)
    return words


def is_word_tokenizer(text_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text tokenizer is one of those that this module makes, which have an id for each word."""
    return text_tokenizer.is_fast and isinstance(
        text_tokenizer.backend_tokenizer.model, models.WordLevel
    )


def grow_word_tokenizer(
    text_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, limit: int
) -> list[str]:
    """Give ids behind all others to the words of `texts` that have none, in place; to the `limit` most frequent ones.

    Returns:
        The new words in the order of their ids, which texts and limit alone decide.
    """
    words = sorted(_new_words(text_tokenizer, texts).items(), key=lambda item: (-item[1], item[0]))[
        :limit
    ]
    vocabulary = text_tokenizer.get_vocab()
    vocabulary |= {word: len(text_tokenizer) + i for i, (word, _) in enumerate(words)}
    if words:
        text_tokenizer.backend_tokenizer.model = models.WordLevel(
            vocabulary, unk_token=text_tokenizer.unk_token
        )
    return [word for word, _ in words]


def unknown_words(text_tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text that become the unknown token, as often as they occur; none for a tokenizer that has no such token.

    Args:
        text_tokenizer: a fast one; of others it is not known where a token comes from, and the list is empty.
    """
    unknown = text_tokenizer.unk_token_id
    if unknown is None or not text_tokenizer.is_fast:
        return []
    options = {
        "add_special_tokens": False,
        "return_offsets_mapping": True,
        "split_special_tokens": True,
    }
    encoded = text_tokenizer(text, **options)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [text[start:end] for token, (start, end) in places if token == unknown]
