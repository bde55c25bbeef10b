"""The full-size configuration, and the import of UniTok's published model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_tokenizer import train_llama_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from unitok_weights import CODEBOOK_SIZE, GRID, LLAMA, NUM_CODEBOOKS, inputs, named_numbers

from vqrae.common.checkpoints import count_parameters
from vqrae.common.config import load_config, shipped_config
from vqrae.common.dry_run import known_config
from vqrae.mllm.config import MLLMConfig
from vqrae.mllm.inference import open_chat, open_generator
from vqrae.mllm.modeling import UnifiedConfig, UnifiedModel
from vqrae.mllm.unitok_checkpoint import import_mllm
from vqrae.scripts.cli import main as vqrae
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.dry_run import tokenizer_config
from vqrae.tokenizer.modeling import VQRAEModel

TESTS = Path(__file__).parents[1]
NAMES = json.loads((TESTS / "mllm" / "golden" / "unitok_rows.json").read_text())["weights"]
HEADS = json.loads((TESTS / "generation" / "golden" / "unitok_heads.json").read_text())


def test_parameters_are_those_of_unitoks_model() -> None:
    config = load_config(MLLMConfig, shipped_config("vqrae.mllm", "unitok_mllm"))
    visual = tokenizer_config(config.tokenizer)
    projection = {"kind": "attention", "num_heads": 16, "code_dim": 8, "in_dim": 64}
    values = UnifiedConfig(
        llm_config=known_config(config.llm).to_dict(),
        num_codebooks=visual.num_codebooks,
        codebook_size=visual.codebook_size,
        projection=projection | {"out_dim": visual.feature_dim},
        head={"num_layers": config.depth.num_layers},
    )
    with torch.device("meta"):
        model = UnifiedModel(values)
    sizes = {name: count_parameters(part)[0] for name, part in model.named_children()}
    width, inner, books, codes = 4096, 11008, visual.num_codebooks, visual.codebook_size
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    head = 3 * layer + width + ((books - 1) * codes + codes) * width + codes
    assert (books, codes, visual.code_shape) == (8, 4096, (256, 8))
    assert sizes["llm"] == 6_738_415_616  # Llama-2-7B
    assert sizes["head"] == head == 741_376_000
    assert count_parameters(model.embedding.mlp)[0] == 2 * 1024 + 1025 * width + (width + 1) * width
    assert count_parameters(model.embedding.projection)[0] == 7_615_744


# ---- import


def published_weights() -> dict[str, Tensor]:
    """Numbers as in the golden scripts, which know each part under its own names."""
    weights = {}
    for name, shape in NAMES.items():
        own = name.removeprefix("model.multi_embedder.").removeprefix("ar_head.")
        weights[name] = named_numbers(own, tuple(shape))
        weights[name] += "norm" in own and own.endswith("weight")
        if name.endswith(("zero_k_bias", "vocab_usage")):
            weights[name].zero_()
    return weights


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as UniTok publishes it, with small sizes."""
    folder = tmp_path / "unitok_mllm"
    folder.mkdir()
    train_llama_tokenizer(folder, legacy=False)
    values: dict[str, Any] = {**LLAMA, "model_type": "mini_gemini", "num_hidden_layers": 2}
    values |= {"vocab_size": 330, "rope_theta": 10000.0, "mm_use_im_start_end": False}
    (folder / "config.json").write_text(json.dumps(values))
    weights = published_weights()
    half = len(weights) // 2
    for i, names in enumerate((list(weights)[:half], list(weights)[half:])):
        save_file({name: weights[name] for name in names}, folder / f"model-{i}.safetensors")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer with the codebooks of the published model."""
    encoder = {"model_type": "siglip_vision_model", "vision_use_head": False, "hidden_size": 32}
    encoder |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder |= {"image_size": 8 * GRID, "patch_size": 8}
    options: dict[str, Any] = {"quantizer": "mcq", "codebook_size": CODEBOOK_SIZE}
    options |= {"num_codebooks": NUM_CODEBOOKS, "codebook_dim": 16}
    options |= {"projection": "attention", "projection_heads": 4}
    model = VQRAEModel(VQRAEConfig(encoder_config=encoder, **options))
    tables = "model.multi_embedder.quantizer.codebooks.{}.codebook.weight"
    weights = published_weights()
    stacked = [weights[tables.format(i)] for i in range(NUM_CODEBOOKS)]
    model.quantizer.codebook.data = torch.stack(stacked)
    model.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@torch.no_grad()
def test_the_published_model_is_imported(published: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "imported"
    vqrae(["import-unitok", str(published), str(out), "--tokenizer", str(tokenizer)])
    generator: Any = open_generator(out)
    model, given = generator.model, inputs()
    embedded = model.embedding(given["images"])
    torch.testing.assert_close(embedded, torch.tensor(HEADS["embedding"]), atol=1e-4, rtol=1e-4)
    logits = model.head(given["hidden"], given["codes"])
    torch.testing.assert_close(logits, torch.tensor(HEADS["depth_logits"]), atol=1e-5, rtol=1e-5)
    expected = published_weights()["model.layers.1.mlp.up_proj.weight"]
    assert model.llm.model.layers[1].mlp.up_proj.weight.equal(expected)
    assert (generator.encode_prompt("a")[-1], generator.sampling.guidance_scale) == (3, 5.0)
    assert generator.images(["a red circle"], seeds=[0]).shape == (1, 3, 8 * GRID, 8 * GRID)
    assert len(open_chat(out, max_new_tokens=2).answer([(None, "red ?")])) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("ar_head.codebooks.1.weight", "1 tensors are of another shape, such as head.embedding"),
        ("lm_head.weight", "1 tensors are missing, such as llm.lm_head"),
        ("tokenizer", "has other codebooks than the tokenizer"),
    ],
)
def test_an_import_that_is_not_whole_is_refused(
    wrong: str, message: str, published: Path, tokenizer: Path, tmp_path: Path
) -> None:
    weights = published_weights()
    weights.pop(wrong, None)
    if wrong == "tokenizer":
        name = "model.multi_embedder.quantizer.codebooks.0.codebook.weight"
        weights[name] = weights[name].flip(0)
    for file in published.glob("*.safetensors"):
        file.unlink()
    save_file(weights, published / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        import_mllm(published, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
