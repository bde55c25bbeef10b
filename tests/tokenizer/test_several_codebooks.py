"""Quantizers with several codebooks: their searches, one of a single codebook, UniTok's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqrae.tokenizer.quantizers import search
from vqrae.tokenizer.quantizers.registry import build_quantizer


def make(name: str, num_codebooks: int) -> Any:
    """A random quantizer with 32 codes in each codebook, and width 16."""
    torch.manual_seed(0)
    return build_quantizer(name, 32, 16, num_codebooks)


def make_features(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["mcq", "rvq"])
def test_one_of_several_codebooks_has_plain_codes(name: str) -> None:
    quantizer = make(name, 1).eval()
    features = make_features(2, 9)
    output = quantizer(features)
    assert output.codes.shape == (2, 9)
    assert torch.equal(quantizer.lookup(output.codes), output.quantized)
    assert torch.equal(quantizer.code_vectors()[output.codes], output.quantized)
    assert quantizer.targets(features[0], output.codes[0])[1].shape == (1, 9)


@pytest.mark.parametrize("train", [False, True])
def test_each_codebook_is_searched_for_its_part_alone(
    train: bool, largest_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BLOCK_SCORES_OF_TABLES", 4 * 32 * 50)
    quantizer = make("mcq", 4).train(train)
    features = make_features(2, 300)
    with torch.autocast("cpu", torch.bfloat16), largest_result:
        codes = quantizer(features).codes
    for i, part in enumerate(features.split(4, dim=-1)):
        cosine = nn.functional.cosine_similarity(part[:, :, None], quantizer.codebook[i], dim=-1)
        assert torch.equal(codes[..., i], cosine.argmax(-1))
    assert largest_result.size == features.numel()  # 9,600 numbers, where all scores are 76,800


def test_each_depth_is_nearest_to_what_is_left() -> None:
    quantizer = make("rvq", 3).eval()
    features = make_features(1, 200)
    quantizer.initialize_from(features[0])
    codes, left = quantizer(features).codes, features.double()
    for depth, table in enumerate(quantizer.codebook.double()):
        assert torch.equal(codes[..., depth], torch.cdist(left, table).argmin(-1))
        left = left - table[codes[..., depth]]
    assert left.square().sum() < 0.6 * features.square().sum()


def test_mcq_equals_unitok() -> None:
    """Against UniTok's own quantizer, see golden/unitok_quantizer.py."""
    file = Path(__file__).parent / "golden" / "unitok_quantizer.json"
    golden = {key: torch.tensor(value) for key, value in json.loads(file.read_text()).items()}
    quantizer = build_quantizer("mcq", 16, 12, 4).train()
    with torch.no_grad():
        quantizer.codebook.copy_(golden["codebook"])
    features = golden["features"].requires_grad_()
    output = quantizer(features)
    loss = output.losses["codebook_loss"] + 0.25 * output.losses["commitment_loss"]
    ((output.quantized * golden["weights"]).sum() + loss).backward()
    assert torch.equal(output.codes, golden["codes"])
    found = {
        "vectors": quantizer.lookup(output.codes),
        "loss": loss,
        "feature_gradient": features.grad,
        "codebook_gradient": quantizer.codebook.grad,
    }
    for key, value in found.items():
        torch.testing.assert_close(value, golden[key], atol=5e-6, rtol=0)
    start = make("mcq", 4).codebook.abs().max()
    assert 0.9 * 4**-0.5 / 36 < start <= 4**-0.5 / 36
