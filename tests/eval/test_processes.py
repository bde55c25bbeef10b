"""Evaluations on two processes: the work is shared, the numbers are those of one, and both processes end well."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vqrae.common.config import load_config, shipped_config
from vqrae.common.files import read_json, weights_fingerprint
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import load_sprites
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.eval.features import evaluate as features
from vqrae.eval.geneval import evaluate as geneval
from vqrae.eval.sharding import run_module
from vqrae.generation.modeling import VisualVocabulary, build_generator
from vqrae.quickstart import locality, scene_questions
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm
from vqrae.understanding.build import build_llava

SMALL = [
    f"model.{key}"
    for key in ("hidden_size=32", "num_hidden_layers=1", "intermediate_size=64", "head_dim=8")
]


@pytest.fixture(scope="module")
def llava(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    for part in build_tiny_llm(
        load_config(TinyLLMConfig, shipped_config("vqrae.quickstart", "tiny_llm"), SMALL)
    ):
        part.save_pretrained(folder / "llm")
    for part in build_llava(tokenizer_folder, folder / "llm"):
        part.save_pretrained(folder / "llava")
    return folder / "llava"


@pytest.fixture(scope="module")
def generator(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = build_generator(
        VisualVocabulary(offset=128, codebook_size=64, num_codes=64),
        llm_config={**sizes, "num_key_value_heads": 2, "head_dim": 16},
    )
    model.config.prompt_template, model.config.max_caption_tokens, model.config.caption_dropout = (
        "{caption}",
        32,
        0.1,
    )
    model.config.vqrae_tokenizer = str(tokenizer_folder)
    model.config.vqrae_tokenizer_fingerprint = weights_fingerprint(tokenizer_folder)
    model.save_pretrained(folder)
    build_word_tokenizer(vocabulary_texts(load_sprites("shapes").names)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    tokenizer_folder: Path,
    llava: Path,
    generator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes leave the processes uneven shares."""
    few = ["num_train=30", "num_test=11", "neighbors=5", "batch_size=4"]
    commands: list[tuple[ModuleType, dict[str, int], list[str]]] = [
        (features, {}, [f"model={tokenizer_folder}", f"original_encoder={tokenizer_folder}", *few]),
        (
            locality,
            {"PROMPTS": 2, "IMAGES": 1},
            [f"model={tokenizer_folder}", "num_images=20", "batch_size=8"],
        ),
        (scene_questions, {"CHUNK": 5}, [f"model={llava}", "num_images=3", "max_new_tokens=2"]),
        (
            geneval,
            {},
            [f"model={generator}", "per_family=2", "images_per_prompt=1", "batch_size=4"],
        ),
    ]
    pairs: list[str] = []
    for module, settings, arguments in commands:
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
        name = module.__name__
        module.main([*arguments, f"output={tmp_path / 'one' / name}.json"])
        numbers = ",".join(f"{key}={value}" for key, value in settings.items())
        pairs += [
            module.__name__,
            numbers,
            *arguments,
            f"output={tmp_path / 'two' / name}.json",
            "--",
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
    result = subprocess.run(
        [*script, *pairs], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for module, *_ in commands:
        file = f"{module.__name__}.json"
        one, two = (read_json(tmp_path / folder / file) for folder in ("one", "two"))
        one.pop("manifest", None), two.pop("manifest", None)
        assert two == one, module.__name__
        assert (
            result.stdout.count(f"->  {tmp_path / 'two' / file}") == 1
        )  # said, and written, by one of them
    images = [sorted((tmp_path / folder / "images").rglob("*.png")) for folder in ("one", "two")]
    assert len(images[0]) == len(images[1]) == 12
    for a, b in zip(*images, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_one_of_several_processes_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="got a launch of 2 processes, expected one that starts others"
    ):
        run_module(features, [], 1)
