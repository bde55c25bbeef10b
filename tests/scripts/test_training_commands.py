"""`vqrae inspect-batch` and `vqrae check-data --config`, on a small run of the embedded default."""

import json

import numpy as np
import pytest
from PIL import Image

from vqrae.quickstart.train_llm import main as train_llm
from vqrae.scripts.cli import main


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "optimization.max_steps=1"]
    train_llm(
        [
            "tiny_llm",
            f"output_dir={folder}",
            *small,
            "optimization.global_batch_size=1",
            "optimization.micro_batch_size=1",
        ]
    )
    return folder


@pytest.fixture
def run(tokenizer_folder, llm, tmp_path):
    """Options of a run on a LLaVA file with a short and a long record."""
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    turns = [
        {"from": "human", "value": "<image>\nwhat color is the star ?"},
        {"from": "gpt", "value": "red"},
    ]
    long = [{"from": "human", "value": "how many ?"}, {"from": "gpt", "value": "two " * 300}]
    records = [
        {"id": "short", "image": "a.png", "conversations": turns},
        {"id": "long", "conversations": long},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    return [
        "--config",
        "tiny",
        f"tokenizer={tokenizer_folder}",
        f"llm={llm}",
        f"data={tmp_path / 'chat.json'}",
    ]


@pytest.mark.parametrize("batching", ["random", "packed"])
def test_a_batch_is_printed_with_its_trained_tokens(batching, run, capsys):
    assert main(["inspect-batch", *run, f"batching={batching}", "max_length=512"]) == 0
    printed = capsys.readouterr().out
    assert "<image x 64>" in printed
    assert "what color is the star" in printed
    assert "[[red<|im_end|>]]" in printed.replace(" <|im_end|>", "<|im_end|>")
    assert "[[two two" in printed
    assert "1 images" in printed
    assert printed.count("--- row") == 2


def test_pretraining_trains_the_caption(run, capsys):
    assert (
        main(["inspect-batch", *run, "data=scenes", "--stage", "pretrain", "--samples", "1"]) == 0
    )
    printed = capsys.readouterr().out
    assert "<image x 64>[[a photo of" in printed
    assert main(["inspect-batch", *run, "--samples", "0"]) == 2


def test_check_data_finds_what_is_too_long(run, tmp_path, capsys):
    file = str(tmp_path / "chat.json")
    assert main(["check-data", file, *run]) == 0
    assert "max_length" not in capsys.readouterr().out
    assert main(["check-data", file, *run, "max_length=200"]) == 0
    printed = capsys.readouterr().out
    assert (
        "note: 1 conversations longer than max_length 200, whose end is cut\n    record long"
        in printed
    )
    assert main(["check-data", file, *run, "max_length=64"]) == 1
    assert (
        "problem: 1 conversations whose first answer lies beyond max_length 64"
        in capsys.readouterr().out
    )
