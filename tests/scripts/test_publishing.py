"""A published folder is complete: each kind reopens in a fresh process, and its card is true."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from fake_hub import fake_hub
from huggingface_hub import ModelCard
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vqrae.common.config import load_config, shipped_config
from vqrae.common.files import read_json, weights_fingerprint, write_json
from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.multi_code import build_multi_code
from vqrae.mllm.build import build_model
from vqrae.mllm.config import MLLMConfig
from vqrae.scripts.cli import main
from vqrae.scripts.publishing.origin import without_paths
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.build import build_llava

ROOT = Path(__file__).parents[2]
WITH_US = ["tokenizer", "unitok", "quantized_llava", "generator", "multi_code", "unified"]


def recorded(tokenizer: Path) -> dict[str, Any]:
    return {
        "vqrae_tokenizer": str(tokenizer),
        "vqrae_tokenizer_fingerprint": weights_fingerprint(tokenizer),
    }


@pytest.fixture(scope="module")
def models(
    tokenizer_folder: Path,
    unitok_folder: Path,
    llm_folder: Path,
    llava: Path,
    generator: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A model of each kind."""
    made = tmp_path_factory.mktemp("models")
    tokenizer = VQRAEModel.from_pretrained(unitok_folder)
    torch.manual_seed(0)
    for part in build_llava(unitok_folder, llm_folder, features="quantized"):
        part.save_pretrained(made / "quantized_llava")

    codes = {"num_codebooks": 4, "codebook_size": 64, "num_codes": tokenizer.config.grid_size**2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    several = build_multi_code(
        VisualVocabulary(offset=128, **codes),
        tokenizer,
        embedding="tokenizer",
        head={"num_layers": 1},
        llm_config={**sizes, **heads},
    )
    prompts = {"prompt_template": "{caption}", "max_caption_tokens": 32, "caption_dropout": 0.1}
    several.config.update({**prompts, **recorded(unitok_folder)})
    several.save_pretrained(made / "multi_code")
    AutoTokenizer.from_pretrained(generator).save_pretrained(made / "multi_code")

    given = [f"tokenizer={unitok_folder}", f"llm={llm_folder}", "depth.num_layers=1"]
    config = load_config(MLLMConfig, shipped_config("vqrae.mllm", "tiny"), given)
    unified, processor = build_model(config, tokenizer, ["a red circle"], attention="sdpa")
    unified.config.update(recorded(unitok_folder))
    for part in (unified, processor):
        part.save_pretrained(made / "unified")

    values = read_json(tokenizer_folder / "config.json")["encoder_config"]
    encoder = SiglipVisionModel(SiglipVisionConfig(**values))
    encoder.save_pretrained(made / "encoder")
    folders = {
        name: made / name for name in ("quantized_llava", "multi_code", "unified", "encoder")
    }
    folders |= {"tokenizer": tokenizer_folder, "unitok": unitok_folder}
    return folders | {"llava": llava, "generator": generator}


@pytest.fixture(scope="module")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published folder of each; four of them with an example."""
    made = tmp_path_factory.mktemp("published")
    for name, model in models.items():
        words = ["publish", str(model), "--dry-run", str(made / name), "--license", "apache-2.0"]
        shown = name in ("tokenizer", "llava", "generator", "encoder")
        assert main([*words, "--example", str(shown).lower()]) == 0
        assert (made / name / "example.png").is_file() == shown
    return {name: made / name for name in models}


@pytest.fixture(scope="module")
def reopened(
    models: dict[str, Path], folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the folders give in a process of their own, and the names of uploaded files."""
    place = tmp_path_factory.mktemp("reopened")
    asked: dict[str, Any] = {
        "plain": {name: str(folders[name]) for name in ("llava", "generator", "encoder")},
        "vqrae": {name: str(folders[name]) for name in WITH_US},
        "hub": str(models["generator"]),
    }
    write_json(place / "request.json", asked)
    with fake_hub() as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_none"}
        online |= {"HF_HOME": str(place / "home"), "HF_ENDPOINT": hub.address}
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "published.py"), "request.json", "out.pt"],
            env={**os.environ, **online},
            cwd=place,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**torch.load(place / "out.pt", weights_only=True), "files": sorted(hub.files)}


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
    return torch.equal(found, expected) if torch.is_tensor(expected) else found == expected


def test_plain_folders_reopen_without_this_package(
    models: dict[str, Path], folders: dict[str, Path], reopened: dict[str, Any]
) -> None:
    expected = published.use(models["llava"], card=folders["llava"])
    assert equal(reopened["plain llava"], expected)
    assert equal(reopened["plain generator"], published.logits(models["generator"]))
    given = published.inputs()
    processor = AutoImageProcessor.from_pretrained(folders["encoder"])
    pixel_values = processor(given["image"], return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, (given["images"] - 0.5) / 0.5)  # as it was trained
    with torch.inference_mode():
        encoder = SiglipVisionModel.from_pretrained(models["encoder"])
        features = encoder(pixel_values).last_hidden_state
    assert equal(reopened["plain encoder"]["features"], features)


def test_all_folders_reopen_with_equal_outputs(
    models: dict[str, Path], folders: dict[str, Path], reopened: dict[str, Any]
) -> None:
    for name in WITH_US:
        expected = published.use(models[name], card=folders[name])
        assert expected, name
        assert equal(reopened[name], expected), name


def test_an_uploaded_generator_opens_by_its_hub_id(reopened: dict[str, Any]) -> None:
    assert equal(reopened["hub"], reopened["generator"])
    uploaded = {name.removeprefix("me/generator/") for name in reopened["files"]}
    assert {"README.md", "visual_tokenizer/model.safetensors", "tokenizer.json"} <= uploaded


def test_a_folder_holds_no_path_of_this_machine(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".yaml")]
        assert not [path for path in texts if str(folder.parent.parent) in path.read_text()]
    for name in ("generator", "multi_code", "unified"):
        assert read_json(folders[name] / "config.json")["vqrae_tokenizer"] == "visual_tokenizer"


def test_a_card_holds_what_was_measured_of_these_weights(
    tokenizer_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    unmeasured = (folders["tokenizer"] / "README.md").read_text()
    assert "Nothing was measured" in unmeasured
    assert "bash scripts/eval_reconstruction.sh model=RUN" in unmeasured
    score = {"psnr": 21.5, "ssim": 0.75, "rfid": None, "protocol": {"name": "standard"}}
    score |= {"num_images": 10, "data": "scenes", "split": "validation", "image_size": 64}
    score |= {"ssim_variant": "gaussian_11", "tokenizer": weights_fingerprint(tokenizer_folder)}
    write_json(tmp_path / "scores" / "mine.json", score)
    write_json(tmp_path / "scores" / "other.json", {**score, "psnr": 99.0, "tokenizer": "other"})
    words = ["publish", str(tokenizer_folder), "--dry-run", str(tmp_path / "out")]
    words += ["--license", "mit", "--evaluations", str(tmp_path / "scores"), "--example", "false"]
    assert main(words) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert (card.data.license, found) == ("mit", {"psnr": 21.5, "ssim": 0.75})
    assert "| psnr | 21.5 |" in card.text
    assert "| psnr | 99 |" not in card.text


def test_what_cannot_be_published_is_said(
    llm_folder: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for words, message in (
        ([str(tokenizer_folder), "--dry-run", out], "depends on data that no run directory record"),
        ([str(llm_folder), "--dry-run", out], "expected a tokenizer"),
        ([str(tokenizer_folder)], "got no repo"),
        (["me/model", "--dry-run", out], "me/model is a hub id"),
        ([str(tokenizer_folder), "--dry-run", str(tmp_path)], "exists: choose another"),
    ):
        assert main(["publish", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_paths_become_their_last_part() -> None:
    texts = {
        "/a/b/train.py tiny out=/c/d data=runs/x": "train.py tiny out=d data=runs/x",
        "hf:a/b s3://bucket/x https://x.org/y": "hf:a/b s3://bucket/x https://x.org/y",
        "~/runs/x and /data/set/": "x and set",
        "../model": "../model",
    }
    assert without_paths(list(texts)) == list(texts.values())
    assert json.loads(json.dumps(without_paths({"a": ["/x/y", 1]}))) == {"a": ["y", 1]}


@pytest.mark.parametrize("name", ["tokenizer", "llava", "generator", "unified"])
def test_the_commands_of_a_card_run(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGES").mkdir()
    for place in ("IMAGES/image.png", "image.png"):
        published.inputs()["image"].save(place)
    text = (folders[name] / "README.md").read_text()
    commands = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0].splitlines()
    for command in commands:
        words = shlex.split(command.replace("OWNER/NAME", str(folders[name])))
        assert main(words[1:]) == 0, command
