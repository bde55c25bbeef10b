"""Batches and their order: code shards, images encoded while training, mixtures of both."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from vqrae.common.files import weights_fingerprint
from vqrae.data.code_shards import CodeDataset
from vqrae.data.sources import fingerprint, is_encoded, open_pairs
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation import extract_codes
from vqrae.generation.data import (
    GenerationCollator,
    TrainingStream,
    encode_images,
    fill_codes,
    load_frozen_tokenizer,
)
from vqrae.generation.modeling import PromptEncoder, VisualVocabulary

SAMPLES = [
    {"codes": torch.arange(16), "caption": "a red circle"},
    {"codes": torch.arange(16).flip(0) + 40, "caption": ""},
    {"codes": torch.full((16,), 63), "caption": "a photo of a red circle"},
]


@pytest.fixture(scope="module")
def pair_codes(pairs: Path, tokenizer_path: Path) -> Path:
    folder = pairs.parent / "codes"
    command = ["tiny", f"tokenizer={tokenizer_path}", f"source={pairs}", f"output_dir={folder}"]
    extract_codes.main([*command, "captions_per_image=2"])  # of scenes: a file has one
    return folder


@pytest.fixture
def collate(vocabulary: VisualVocabulary) -> GenerationCollator:
    words = build_word_tokenizer(["a photo of a red circle"])
    return GenerationCollator(PromptEncoder(words, vocabulary))


def test_prompts_end_where_the_codes_begin(
    collate: GenerationCollator, vocabulary: VisualVocabulary
) -> None:
    batch = collate(SAMPLES)
    assert torch.equal(batch["codes"], torch.stack([sample["codes"] for sample in SAMPLES]))
    assert (batch["input_ids"][:, -1] == vocabulary.begin_of_image).all()
    assert batch["attention_mask"].sum(1).tolist() == [3 + 1 + 16, 1 + 16, 6 + 1 + 16]
    assert batch["position_ids"][:, -1].tolist() == [19, 16, 22]


def test_images_become_codes_in_their_rows(
    pair_codes: Path,
    pairs: Path,
    tokenizer_path: Path,
    collate: GenerationCollator,
    vocabulary: VisualVocabulary,
) -> None:
    """A batch of both kinds equals the batch of the same samples from shards."""
    options = {"image_size": 32, "tokenizer_fingerprint": weights_fingerprint(tokenizer_path)}
    codes = open_pairs(str(pair_codes), **options)
    live = open_pairs(str(pairs), **options)
    assert (is_encoded(codes), is_encoded(live)) == (True, False)
    assert len(codes) == len(live) == 11  # one is held back
    encoder = load_frozen_tokenizer(tokenizer_path)
    expected = collate([codes[i] for i in range(5)])
    mixed = collate([(live if i in (1, 4) else codes)[i] for i in range(5)])
    assert mixed["image_rows"].tolist() == [1, 4]
    filled = fill_codes(mixed, lambda images: encode_images(encoder, images))
    assert filled.keys() == expected.keys()
    assert all(torch.equal(filled[name], expected[name]) for name in expected)


def test_a_mixture_of_both_kinds_keeps_its_shares(
    pair_codes: Path, pairs: Path, tokenizer_path: Path
) -> None:
    mixture = open_pairs(
        f"{pair_codes}*0.75+{pairs}*0.25",
        image_size=32,
        tokenizer_fingerprint=weights_fingerprint(tokenizer_path),
    )
    stream = TrainingStream(mixture, 200, caption_dropout=0.1, seed=3)
    kinds = Counter("codes" in stream[i] for i in range(200))
    assert abs(kinds[True] - 150) <= 10
    again = TrainingStream(mixture, 200, caption_dropout=0.1, seed=3)
    assert [again[i]["caption"] for i in (199, 7)] == [stream[i]["caption"] for i in (199, 7)]


def test_codes_are_no_images_and_need_their_tokenizer(pair_codes: Path) -> None:
    assert "manifest sha256" in fingerprint(str(pair_codes))
    with pytest.raises(ValueError, match="holds codes"):
        open_pairs(str(pair_codes), image_size=32)
    with pytest.raises(ValueError, match="was made with tokenizer"):
        open_pairs(f"{pair_codes}*1+scenes*1", image_size=32, tokenizer_fingerprint="0" * 64)


def test_stream_is_a_function_of_position(codes_path: Path) -> None:
    codes = CodeDataset(codes_path)
    stream = TrainingStream(codes, 100, caption_dropout=0.3, seed=1)
    in_order = [stream[i] for i in range(100)]
    again = TrainingStream(codes, 100, caption_dropout=0.3, seed=1)
    for i in (99, 0, 57, 20):
        assert again[i]["caption"] == in_order[i]["caption"]
        assert torch.equal(again[i]["codes"], in_order[i]["codes"])
    whole = Counter(tuple(codes[i]["codes"].tolist()) for i in range(20))
    for start in range(0, 100, 20):
        epoch = in_order[start : start + 20]
        assert Counter(tuple(sample["codes"].tolist()) for sample in epoch) == whole
    dropped = [sample["caption"] == "" for sample in in_order]
    assert 15 < sum(dropped) < 45
    assert dropped[:20] != dropped[20:40]
    complete = TrainingStream(codes, 50, caption_dropout=0)
    assert all(complete[i]["caption"] for i in range(50))
