"""A grafted InternVL sees with the tokenizer's encoder and is the original in everything else."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
)

from vqrae.common.files import weights_fingerprint
from vqrae.common.images import image_to_tensor
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.scripts.cli import main
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.graft import graft

TEXT = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
TEXT |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def tokenizer(make_tokenizer, tmp_path: Path) -> Path:
    """An InternViT tokenizer; its images are normalised as InternVL's."""
    folder = tmp_path / "tokenizer"
    make_tokenizer("internvit", image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


@pytest.fixture
def internvl(tokenizer: Path, tmp_path: Path) -> Path:
    """A random bfloat16 InternVL in two weight files, with the tower the tokenizer began with."""
    vision = VQRAEModel.from_pretrained(tokenizer).encoder.config.to_dict()
    torch.manual_seed(1)
    options = {"image_token_id": 5, "image_seq_length": 4}
    config = InternVLConfig(vision_config=vision, text_config=TEXT, **options)
    folder = tmp_path / "internvl"
    model = InternVLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    size = {"height": 56, "width": 56}
    values = {"image_mean": list(MEAN), "image_std": list(STD), "size": size}
    GotOcr2ImageProcessor(**values).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_only_the_tower_changes(internvl: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--model", str(internvl), "--tokenizer", str(tokenizer), "--out", str(out)]
    assert main(["graft", *given]) == 0
    before, after = weights(internvl), weights(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        replaced = "vision_tower" in name and tensor.unique().numel() > 1
        assert torch.equal(after[name], tensor) != replaced, name
    kept = ("tokenizer.json", "preprocessor_config.json", "generation_config.json")
    for name in (*kept, "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (internvl / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (internvl, out))
    assert new == old | {"vqrae_tokenizer_fingerprint": weights_fingerprint(tokenizer)}
    fingerprints = json.loads((out / "manifest.json").read_text())["fingerprints"]
    parts = {"model": internvl, "tokenizer": tokenizer, "result": out}
    assert fingerprints == {name: weights_fingerprint(folder) for name, folder in parts.items()}


def test_the_grafted_tower_gives_the_tokenizers_features(
    internvl: Path, tokenizer: Path, tmp_path: Path
) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        graft(internvl, tokenizer, tmp_path / "out"), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # In the precision of the model's weights.
    donor = VQRAEModel.from_pretrained(tokenizer).to(torch.bfloat16).float().eval()
    image = image_to_tensor(Image.fromarray(SceneDataset(image_size=56).pixels(0)))[None]
    seen: list[torch.Tensor] = []
    shuffle = InternVLModel.pixel_shuffle
    model.model.pixel_shuffle = lambda features, **options: (
        seen.append(features),
        shuffle(model.model, features, **options),
    )[1]
    with torch.no_grad():
        model.model.get_image_features(donor.normalize(image))
        expected = donor.encode_features(image)
    torch.testing.assert_close(seen[0].flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_mean": (0.5, 0.5, 0.5)},
            r"image_mean: .*internvl has \[0.485, 0.456, 0.406\], .*other has \[0.5, 0.5, 0.5\]",
        ),
        ({"layers": 3}, r"num_hidden_layers: .*internvl has 2, .*other has 3"),
        (
            {"encoder": "siglip"},
            r"other encodes with a 'siglip_vision_model', but the tower of .* is 'internvl_vision'",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    change, message, internvl: Path, tokenizer: Path, make_tokenizer, tmp_path
) -> None:
    other = VQRAEModel.from_pretrained(tokenizer).config
    other.image_mean = change.get("image_mean", other.image_mean)
    other.encoder_config["num_hidden_layers"] = change.get("layers", 2)
    model = make_tokenizer("siglip") if change.get("encoder") else VQRAEModel(other)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        graft(internvl, tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_foreign_model_is_refused(
    internvl: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is a 'vqrae' model, expected 'internvl'"):
        graft(tokenizer, tokenizer, tmp_path / "out")
    with pytest.raises(FileExistsError, match="give another folder"):
        graft(internvl, tokenizer, internvl)
    files = internvl.glob("*.safetensors")
    file = next(file for file in files if "cls_token" in "".join(load_file(file)))
    tensors = load_file(file)
    name = next(name for name in tensors if "cls_token" in name)
    save_file(tensors | {name: torch.zeros(1, 1, 16)}, file)
    with pytest.raises(
        ValueError, match=r"cls_token: .* has shape \(1, 1, 16\), .* has \(1, 1, 32\)"
    ):
        graft(internvl, tokenizer, tmp_path / "out")
    tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="hold different weights"):
        graft(internvl, tokenizer, tmp_path / "out")
