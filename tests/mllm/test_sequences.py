"""Rows as UniTok's own collator makes them, cut captions, places in a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_tokenizer import train_llama_tokenizer
from PIL import Image

from vqrae.common.trainer import IGNORE_INDEX
from vqrae.generation.data import fill_codes
from vqrae.mllm.build import build_processor
from vqrae.mllm.sequences import (
    ImagePrompt,
    ImageVocabulary,
    SequenceEncoder,
    UnifiedCollator,
)
from vqrae.tokenizer.configuration import VQRAEConfig

GOLDEN = json.loads((Path(__file__).parent / "golden" / "unitok_rows.json").read_text())
ENCODER = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
BYTES = ("<0x00>", "<0x01>")  # of Llama's tokenizer: ids 3 and 4
CODES = torch.arange(8).view(4, 2)


def make_encoder(folder: Path, *, legacy: bool = False, max_tokens: int = 1750) -> SequenceEncoder:
    text_tokenizer = train_llama_tokenizer(folder, legacy=legacy)
    config = VQRAEConfig(encoder_config=ENCODER)
    given: dict[str, Any] = {"chat_template": "vicuna_v1", "aspect_ratio": "pad"}
    processor = build_processor(config, text_tokenizer, BYTES, **given)
    vocabulary = ImageVocabulary(offset=3, codebook_size=8, num_codes=4, num_codebooks=2)
    return SequenceEncoder(
        processor, ImagePrompt(text_tokenizer, vocabulary, max_tokens=max_tokens), 4
    )


@pytest.fixture
def encode(tmp_path: Path) -> SequenceEncoder:
    return make_encoder(tmp_path)


@pytest.fixture
def dialogue() -> dict[str, Any]:
    speakers = ("human", "gpt", "human", "gpt")
    turns = zip(speakers, GOLDEN["turns"], strict=True)
    pixels = np.full((30, 60, 3), 255, dtype=np.uint8)
    record = {"id": "r1", "conversations": [{"from": who, "value": text} for who, text in turns]}
    return {**record, "image": Image.fromarray(pixels), "task": "instructions"}


def pair(task: str, caption: str = GOLDEN["caption"], **image: Any) -> dict[str, Any]:
    key = "caption" if task == "generation" else "answer"
    return {"task": task, key: caption, **(image or {"codes": CODES})}


@pytest.mark.parametrize("legacy", [False, True])
def test_rows_are_those_of_unitok(legacy: bool, dialogue: dict[str, Any], tmp_path: Path) -> None:
    encode = make_encoder(tmp_path, legacy=legacy)
    samples = {"generation": pair("generation"), "unconditional": pair("generation", "")}
    samples |= {"captioning": pair("captioning"), "instructions": dialogue}
    golden = GOLDEN[f"legacy={legacy}"]
    assert (encode.boi, encode.eoi) == (3, 4)
    for name, sample in samples.items():
        row = encode(sample)
        words = encode.text_tokenizer.convert_ids_to_tokens(row["input_ids"].tolist())
        trained = (row["labels"] != IGNORE_INDEX).tolist()
        marked = ["*" * mark + word for mark, word in zip(trained, words, strict=True)]
        assert marked == golden[name]["tokens"]
        assert row["labels"][trained].equal(row["input_ids"][trained])
        batch = UnifiedCollator(encode, (4, 2))([sample])
        for (start, end), i in zip(golden[name]["generated"], batch["generated"], strict=False):
            assert batch["image_places"][i].tolist() == list(range(start, end))
        assert batch["num_image_codes"] == 8 * len(golden[name]["generated"])


def test_a_long_caption_loses_its_end_and_never_the_prompt(tmp_path: Path) -> None:
    caption = "red circle " * 40 + "star"
    whole, cut = make_encoder(tmp_path).prompt, make_encoder(tmp_path, max_tokens=60)
    asked, expected = cut.prompt(caption), whole(caption)
    kept = cut.prompt.max_caption_tokens
    assert (len(asked), len(whole("red")) - len(whole.ids("red"))) == (60 + 1, 60 - kept + 1)
    assert asked[: kept + 1] == expected[: kept + 1]
    assert asked[kept + 1 :] == expected[-(60 - kept) :]
    assert len(cut(pair("captioning", caption))["input_ids"]) == 1 + 1 + 4 + 1 + kept + 1
    assert cut.prompt("</s><image>").count(cut.processor.image_token_id) == 0  # plain text
    with pytest.raises(ValueError, match="max_caption_tokens: got 9, expected more than"):
        make_encoder(tmp_path, max_tokens=9)


def test_a_batch_knows_the_places_of_images_and_targets(
    encode: SequenceEncoder, dialogue: dict[str, Any]
) -> None:
    pixels = torch.arange(3 * 16 * 16).view(3, 16, 16).to(torch.uint8)
    silent = {key: value for key, value in dialogue.items() if key != "image"}
    silent["conversations"] = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "two"}]
    broken = {**silent, "id": "r2", "conversations": []}
    samples = [pair("captioning", image=pixels), silent, pair("generation"), broken, dialogue]
    batch = UnifiedCollator(encode, (4, 2))(samples)
    ids = batch["input_ids"].flatten()
    assert (batch["input_ids"].shape[0], batch["image_places"].shape) == (4, (3, 4))
    assert (ids[batch["image_places"]] == encode.processor.image_token_id).all()
    assert ids[batch["text_places"] + 1].equal(batch["text_targets"])
    assert batch["generated"].tolist() == [1]
    assert ids[batch["image_places"][1, 0] - 1] == encode.boi
    # Facts of UniTok, check 8: the codes of the images to generate, and the trained text.
    assert (batch["num_image_codes"], batch["num_targets"]) == (8, 8 + len(batch["text_places"]))
    assert batch["image_rows"].tolist() == [0, 2]
    assert batch["images"][0].equal(pixels)
    border = batch["images"][1, :, 0, 0].tolist()
    assert (border, batch["images"][1, :, 8, 8].tolist()) == ([122, 116, 104], [255, 255, 255])
    filled = fill_codes(batch, lambda images: torch.full((len(images), 4, 2), 7))
    assert filled["codes"].tolist() == [[[7, 7]] * 4, CODES.tolist(), [[7, 7]] * 4]
    assert "images" not in filled
    assert batch["codes"][0].eq(0).all()  # as it was


@pytest.mark.parametrize("lost", [False, True])
def test_a_batch_without_images_gets_a_blank_one(encode: SequenceEncoder, lost: bool) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "two"}]
    record = {"task": "instructions", "id": "r", "conversations": [] if lost else turns}
    batch = UnifiedCollator(encode, (4,))([record])
    assert batch["codes"].tolist() == [[0, 0, 0, 0]]
    assert batch["num_image_codes"] == 0
    assert bool(batch["num_targets"] > 0) is not lost
    if not lost:
        assert (batch["attention_mask"].flatten()[batch["image_places"]] == 0).all()
