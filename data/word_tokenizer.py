"""A word-level text tokenizer for the small language models of the embedded default, as a plain Hugging Face tokenizer."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, START, END, IMAGE = "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>", "<image>"
ROLES = ["system", "user", "assistant"]


def build_word_tokenizer(texts: Sequence[str], *, end_with: str | None = None) -> PreTrainedTokenizerFast:
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
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.WordLevelTrainer(special_tokens=specials, vocab_size=1 << 20, min_frequency=1, show_progress=False)
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
