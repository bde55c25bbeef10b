"""No evaluation scores a model whose weights are not all there, or are not finite."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from vqrae.eval.features import evaluate as features
from vqrae.eval.geneval.clip_colors import ClipColorClassifier
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.quickstart import locality


def copy(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A model folder with other weights."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(params=["incomplete", "diverged"])
def broken(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path: Path) -> Path:
    name = "encoder.encoder.layers.0.self_attn.q_proj.weight"
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "incomplete": lambda weights: weights.pop(name),
        "diverged": lambda weights: weights[name].fill_(torch.nan),
    }
    return copy(tokenizer_folder, tmp_path / request.param, changes[request.param])


@pytest.mark.parametrize("module", [reconstruction, features, locality])
def test_tokenizers_are_refused(module: object, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=broken.name):
        module.main([f"model={broken}", f"output={tmp_path / 'scores.json'}"])  # type: ignore[attr-defined]
    assert not (tmp_path / "scores.json").exists()


def test_original_encoders_are_refused(
    tokenizer_folder: Path, broken: Path, tmp_path: Path
) -> None:
    judged = [f"model={tokenizer_folder}", f"original_encoder={broken}"]
    judged.append(f"output={tmp_path / 'scores.json'}")
    for module, more in ((reconstruction, ["frechet=[encoder]"]), (features, [])):
        with pytest.raises(ValueError, match=broken.name):
            module.main([*judged, *more])
    assert not (tmp_path / "scores.json").exists()


def test_a_clip_that_lacks_weights_names_no_colours(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config={**small, "vocab_size": 64}, vision_config=vision)
    whole, part = tmp_path / "whole", tmp_path / "part"
    CLIPModel(config).save_pretrained(whole)
    folder = copy(whole, part, lambda weights: weights.pop("visual_projection.weight"))
    with pytest.raises(ValueError, match="part lacks weights of a CLIPModel"):
        ClipColorClassifier.from_pretrained(str(folder))
