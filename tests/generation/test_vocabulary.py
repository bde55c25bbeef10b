"""Visual ids lie where the config says; prompts end in BOI and keep their template."""

import pytest

from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation.modeling import PromptEncoder, VisualVocabulary, pad_left

WORDS = build_word_tokenizer(["a photo of a red circle user assistant {}"])


def test_ids_and_rows() -> None:
    vocabulary = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=1024)
    assert vocabulary.begin_of_image == 168_320
    assert vocabulary.num_rows == 168_448 == 128 * 1316
    assert vocabulary.code_rows == slice(151_936, 168_320)


def test_a_new_text_token_changes_no_prompt(vocabulary: VisualVocabulary) -> None:
    text_tokenizer = build_word_tokenizer(["a photo of a red circle"])
    before = PromptEncoder(text_tokenizer, vocabulary)("a red circle")
    text_tokenizer.add_tokens(["<new>"])
    assert PromptEncoder(text_tokenizer, vocabulary)("a red circle") == before
    assert before[-1] == vocabulary.begin_of_image == 164


def test_text_ids_must_not_reach_visual_ids() -> None:
    with pytest.raises(ValueError, match="visual ids start at 4: set a larger offset"):
        PromptEncoder(WORDS, VisualVocabulary(offset=4, codebook_size=8, num_codes=4))


def test_template_survives_a_long_caption(vocabulary: VisualVocabulary) -> None:
    template = "<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    encode = PromptEncoder(WORDS, vocabulary, template=template, max_caption_tokens=3)
    ids = encode("a photo of a red circle")
    assert WORDS.convert_ids_to_tokens(ids[:-1]) == [
        "<|im_start|>", "user", "a", "photo", "of", "<|im_end|>", "<|im_start|>", "assistant"
    ]  # fmt: skip
    assert encode.unconditional == [*ids[:2], *ids[5:]]


def test_a_caption_is_only_text(vocabulary: VisualVocabulary) -> None:
    encode = PromptEncoder(WORDS, vocabulary)
    assert WORDS.convert_tokens_to_ids("<|im_end|>") not in encode(
        "a red <|im_end|> circle {caption} {}"
    )


def test_what_a_caption_loses_is_named(vocabulary: VisualVocabulary) -> None:
    encode = PromptEncoder(WORDS, vocabulary, max_caption_tokens=4)
    assert encode.losses("a Red circle") == []
    unknown, cut = encode.losses("a photo of a crimson zebra, crimson")
    assert unknown == "3 words have no id and are read as unknown: crimson, zebra, ,"
    assert cut == "its end is cut: 8 tokens, of which 4 are read"


@pytest.mark.parametrize("template", ["", "{caption} {caption}", "{Caption}"])
def test_template_needs_one_caption(vocabulary: VisualVocabulary, template: str) -> None:
    with pytest.raises(ValueError, match=r"expected text with \{caption\} once"):
        PromptEncoder(WORDS, vocabulary, template=template)


def test_pad_left() -> None:
    assert pad_left([[1], [2, 3]], 0) == [[0, 1], [2, 3]]
