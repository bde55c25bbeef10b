"""Words that the small language model lacks: learned, saved with the model, answered."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from vqrae.data.conversations import Conversations
from vqrae.data.sources import texts_of
from vqrae.data.word_tokenizer import (
    build_word_tokenizer,
    describe_unknown,
    grow_word_tokenizer,
    unknown_words,
)
from vqrae.scripts.cli import main
from vqrae.understanding import train
from vqrae.understanding.build import add_word_rows
from vqrae.understanding.chat import Chat


@pytest.fixture
def own_data(tmp_path):
    """A LLaVA file about colors that the scenes do not have."""
    records = []
    for i, color in enumerate(("teal", "crimson", "teal", "crimson")):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{i}.png")
        answer = {"from": "gpt", "value": f"Teal-ish {color}"}
        turns = [{"from": "human", "value": "<image>\nwhich hue ?"}, answer]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (tmp_path / "own.json").write_text(json.dumps(records))
    return tmp_path / "own.json"


def test_a_word_tokenizer_grows_and_keeps_its_ids(own_data, tmp_path):
    text_tokenizer = build_word_tokenizer(["which color ?", "red"])
    before = text_tokenizer.get_vocab()
    texts = texts_of(Conversations(own_data))
    assert texts[:2] == ["\nwhich hue ?", "Teal-ish teal"]
    assert unknown_words(text_tokenizer, texts[1]) == ["Teal", "-", "ish", "teal"]
    words = grow_word_tokenizer(text_tokenizer, texts, limit=4)
    assert words == ["teal", "-", "hue", "ish"]
    assert grow_word_tokenizer(text_tokenizer, texts, limit=9) == ["crimson"]
    assert grow_word_tokenizer(text_tokenizer, texts, limit=9) == []
    text_tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    new = [*words, "crimson"]
    ids = range(len(before), len(before) + len(new))
    assert read.get_vocab() == before | dict(zip(new, ids, strict=True))
    assert read.decode(read("<|im_start|>teal CRIMSON").input_ids) == "<|im_start|> teal crimson"


def test_new_rows_start_among_the_known_ones(llm_folder):
    model = AutoModelForCausalLM.from_pretrained(llm_folder)
    first = len(AutoTokenizer.from_pretrained(llm_folder))
    weights = []
    for _ in range(2):
        with torch.no_grad():
            model.get_input_embeddings().weight[first:].fill_(1e3)
        add_word_rows(model, first, first + 100)
        weights.append(model.get_input_embeddings().weight.detach().clone())
    assert len(weights[0]) >= first + 100
    assert torch.equal(weights[0][: first + 100], weights[1][: first + 100])
    known, new = weights[0][:first], weights[0][first : first + 100]
    assert (new.mean(0) - known.mean(0)).abs().max() < 0.1 * known.std()
    assert 0 < new.std(0).max() < known.std()


@pytest.mark.parametrize("options", [[], ["lora={rank: 4, alpha: 8}"]])
def test_own_words_are_learned_in_both_stages_and_answered(
    options, own_data, tokenizer_folder, llm_folder, tmp_path, capsys
):
    given = {"tokenizer": tokenizer_folder, "llm": llm_folder, "data": own_data}
    given["output_dir"] = tmp_path / "run"
    steps = {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4, "logging_steps": 1}
    stages = [f"{stage}.{key}={value}" for stage in train.STAGES for key, value in steps.items()]
    train.main(["tiny", *(f"{key}={value}" for key, value in given.items()), *stages, *options])
    printed = capsys.readouterr().out
    assert "text: 6 words of the data are new to the language model: teal" in printed
    assert "<|unk|>" not in printed
    chat = Chat.from_pretrained(tmp_path / "run", max_new_tokens=1)
    assert unknown_words(chat.text_tokenizer, "teal crimson hue") == []
    ids = chat.text_tokenizer("teal").input_ids
    assert chat.model.get_input_embeddings().num_embeddings > ids[0]
    assert chat.text_tokenizer.decode(ids) == "teal"


def test_check_data_names_them_and_a_batch_holds_them(
    own_data, tokenizer_folder, llm_folder, capsys
):
    run = ["--config", "tiny", f"tokenizer={tokenizer_folder}", f"llm={llm_folder}"]
    assert main(["check-data", str(own_data), *run]) == 0
    printed = capsys.readouterr().out
    assert "note: 24 of 28 tokens (85.7%) are words that the text tokenizer" in printed
    assert "'teal' (2), 'crimson' (2); training gives them ids" in printed
    assert main(["inspect-batch", *run, f"data={own_data}", "--no-color"]) == 0
    assert "teal - ish crimson" in capsys.readouterr().out


def test_words_that_stay_unknown_are_named_with_their_share(qwen_like, vicuna_like):
    text_tokenizer = build_word_tokenizer(["which color ?", "red"])
    texts = ["which hue ?", "teal red teal"]
    line = describe_unknown(text_tokenizer, texts)
    assert line.startswith("3 of 6 tokens (50.0%) are words that the text tokenizer reads as")
    assert "2 different ones: 'teal' (2)" in line
    assert describe_unknown(text_tokenizer, ["red"]) is None
    assert describe_unknown(qwen_like, texts) is None
    assert describe_unknown(vicuna_like, texts) is None  # bytes stand for what it lacks
