"""Encoding while training: the same steps as from code shards, in mixtures too, resumable."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

from vqrae.common.files import weights_fingerprint
from vqrae.common.run import read_metrics
from vqrae.data.code_shards import CodeDataset
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import SPRITE_SETS
from vqrae.data.sources import (
    fingerprint,
    is_encoded,
    open_images,
    open_pairs,
    open_pairs_or_codes,
    texts_of,
)
from vqrae.data.word_tokenizer import build_word_tokenizer, fit_word_tokenizer
from vqrae.generation import extract_codes, train
from vqrae.generation.data import (
    GenerationCollator,
    TrainingStream,
    encode_images,
    fill_codes,
    load_encoder,
)
from vqrae.generation.modeling import PromptEncoder, VisualVocabulary


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned photographs of various shapes: a .jsonl, and the same as a tar in BLIP3-o's layout."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    with webdataset.TarWriter(str(folder / "pairs.tar")) as tar:
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (36 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            text = f"a zebra and {i} unicorns"
            tar.write(
                {"__key__": f"{i:05d}", "png": (folder / f"{i}.png").read_bytes(), "txt": text}
            )
            lines.append(json.dumps({"image": f"{i}.png", "caption": text}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def jsonl_codes(pairs: Path, tokenizer_path: Path) -> Path:
    source = [
        f"source={pairs / 'pairs.jsonl'}",
        "captions_per_image=2",
    ]  # of scenes: a file has one
    extract_codes.main(
        ["tiny", f"tokenizer={tokenizer_path}", *source, f"output_dir={pairs / 'codes'}"]
    )
    return pairs / "codes"


# ---- sources


def test_a_code_set_is_a_source(jsonl_codes: Path, pairs: Path, tokenizer_path: Path) -> None:
    options = {"image_size": 32, "tokenizer_fingerprint": weights_fingerprint(tokenizer_path)}
    codes = open_pairs_or_codes(str(jsonl_codes), **options)
    live = open_pairs_or_codes(str(pairs / "pairs.jsonl"), **options)
    assert (is_encoded(codes), is_encoded(live)) == (True, False)
    assert len(codes) == len(live) == 11  # one is held back
    encoder = load_encoder(tokenizer_path)
    for i in range(11):
        assert codes[i]["caption"] == live[i]["caption"]
        assert torch.equal(codes[i]["codes"], encode_images(encoder, live[i]["image"][None])[0])
    assert "manifest sha256" in fingerprint(str(jsonl_codes))
    for open_source in (open_images, open_pairs):
        with pytest.raises(ValueError, match=r"holds codes|has no images"):
            open_source(str(jsonl_codes), image_size=32)
    with pytest.raises(ValueError, match="was made with tokenizer"):
        open_pairs_or_codes(
            f"{jsonl_codes}*1+scenes*1", image_size=32, tokenizer_fingerprint="0" * 64
        )


def test_several_crops_are_entries_of_their_own(
    pairs: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    source = [f"source={pairs / 'pairs.tar'}", "crop=random", "crops_per_image=2"]
    extract_codes.main(["tiny", f"tokenizer={tokenizer_path}", *source, f"output_dir={tmp_path}"])
    codes = CodeDataset(tmp_path)
    assert (codes.manifest.crop, codes.manifest.crops_per_image, len(codes)) == ("random", 2, 22)
    assert [codes.texts(i) for i in range(11)] == [codes.texts(i) for i in range(11, 22)]
    assert sum(torch.equal(codes[i]["codes"], codes[i + 11]["codes"]) for i in range(11)) < 6
    with pytest.raises(ValueError, match="set crop=random or zoom"):
        extract_codes.main(["tiny", "crops_per_image=2"])
    with pytest.raises(ValueError, match="scenes are square"):
        extract_codes.ImagesToEncode(open_pairs("scenes", image_size=32, size=4), crops_per_image=2)


def test_texts_of_every_kind(jsonl_codes: Path, pairs: Path) -> None:
    options = {
        "image_size": 32,
        "tokenizer_fingerprint": CodeDataset(jsonl_codes).manifest.tokenizer_fingerprint,
    }
    texts = sorted(CodeDataset(jsonl_codes).texts(i)[0] for i in range(11))
    for source in (jsonl_codes, pairs / "pairs.jsonl"):
        assert sorted(texts_of(open_pairs_or_codes(str(source), **options))) == texts
    mixture = open_pairs_or_codes(
        f"{jsonl_codes}*1+{pairs / 'pairs.tar'}*1+scenes*1+emoji*1", **options
    )
    found = texts_of(mixture, limit=5)
    assert len(found) == 15 + len(vocabulary_texts(SPRITE_SETS["shapes"].names))
    assert sum("background" in text for text in found) == 5


def test_frequent_words_get_ids_as_far_as_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["A zebra, a gnu", "a zebra and a yak", "a circle"]
    base = build_word_tokenizer(["a red circle"])
    whole = fit_word_tokenizer(["a red circle"], captions, size=100)
    assert set(whole.get_vocab()) - set(base.get_vocab()) == {"zebra", "gnu", "yak", "and", ","}
    assert capsys.readouterr().err == ""
    small = fit_word_tokenizer(["a red circle"], captions, size=len(base) + 2)
    assert set(small.get_vocab()) - set(base.get_vocab()) == {"zebra", ","}
    assert f"3 of {len(base) + 5} words have no id and become <|unk|>" in capsys.readouterr().err
    assert fit_word_tokenizer(["a red circle"], ["red"], size=100).get_vocab() == base.get_vocab()


# ---- batches


def test_images_become_codes_in_their_rows(
    jsonl_codes: Path, pairs: Path, tokenizer_path: Path, vocabulary: VisualVocabulary
) -> None:
    """A mixed batch equals the batch of the same samples from shards; what the mixture gives is both kinds."""
    options = {"image_size": 32, "tokenizer_fingerprint": weights_fingerprint(tokenizer_path)}
    codes, live = (
        open_pairs_or_codes(str(source), **options)
        for source in (jsonl_codes, pairs / "pairs.jsonl")
    )
    encoder = load_encoder(tokenizer_path)
    collate = GenerationCollator(
        PromptEncoder(build_word_tokenizer(["a zebra and unicorns"]), vocabulary), vocabulary
    )
    expected = collate([codes[i] for i in range(5)])
    mixed = collate([(live if i in (1, 4) else codes)[i] for i in range(5)])
    assert mixed["image_rows"].tolist() == [1, 4]
    filled = fill_codes(mixed, lambda images: encode_images(encoder, images), vocabulary)
    assert filled.keys() == expected.keys()
    assert all(torch.equal(filled[name], expected[name]) for name in expected)

    mixture = open_pairs_or_codes(f"{jsonl_codes}*0.75+{pairs / 'pairs.tar'}*0.25", **options)
    stream = TrainingStream(mixture, 400, caption_dropout=0.1, seed=3)
    kinds = Counter("codes" in stream[i] for i in range(400))
    assert abs(kinds[True] - 300) <= 10
    again = TrainingStream(mixture, 400, caption_dropout=0.1, seed=3)
    assert [again[i]["caption"] for i in (399, 7)] == [stream[i]["caption"] for i in (399, 7)]


# ---- runs


@pytest.fixture(scope="module")
def live_run(
    train_arguments: list[str], pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("live")
    options = ["optimization.save_total_limit=2", f"data={pairs / 'pairs.jsonl'}"]
    train.main([*train_arguments, *options, f"output_dir={folder}"])
    return folder


def test_live_training_takes_the_steps_of_training_on_shards(
    live_run: Path, jsonl_codes: Path, train_arguments: list[str], tmp_path: Path
) -> None:
    train.main([*train_arguments, f"data={jsonl_codes}", f"output_dir={tmp_path}"])
    ours, theirs = (
        load_file(folder / "model" / "model.safetensors") for folder in (live_run, tmp_path)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (
        "pairs.jsonl"
        in json.loads((live_run / "manifest.json").read_text())["fingerprints"]["data"]
    )


def test_a_live_run_resumes_exactly(
    live_run: Path, pairs: Path, train_arguments: list[str], tmp_path: Path
) -> None:
    (live_run / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    train.main([*train_arguments, f"data={pairs / 'pairs.jsonl'}", f"output_dir={tmp_path}"])
    ours, theirs = (
        load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, live_run)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = {row["step"]: row["loss"] for row in read_metrics(live_run)}
    assert [row["loss"] for row in read_metrics(tmp_path)] == [losses[3], losses[4]]
