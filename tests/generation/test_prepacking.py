"""Prepacked linear layers: equal to plain ones up to the order of sums, and gone afterwards."""

import pytest
import torch
from torch import nn
from transformers import Qwen3ForCausalLM

from vqrae.generation import prepacking
from vqrae.generation.prepacking import PrepackedLinear, prepacked_linears

needs_bf16 = pytest.mark.skipif(
    not prepacking.can_prepack(), reason="oneDNN computes no bfloat16 on this processor"
)


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@needs_bf16
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_layer_equals_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 72, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(rows, 3, 40, dtype=torch.bfloat16)
    torch.testing.assert_close(PrepackedLinear(layer)(inputs), layer(inputs), rtol=0.02, atol=0.01)


@needs_bf16
@torch.inference_mode()
def test_model_equals_itself_and_is_restored(model: Qwen3ForCausalLM) -> None:
    model = model.to(torch.bfloat16)
    before, ids = types(model), torch.arange(24).view(2, 12)
    plain = model(ids).logits
    with prepacked_linears(model):
        assert PrepackedLinear in types(model)
        torch.testing.assert_close(model(ids).logits, plain, rtol=0.05, atol=0.05)
    assert types(model) == before
    with pytest.raises(KeyError), prepacked_linears(model):
        raise KeyError
    assert types(model) == before


@pytest.mark.parametrize("missing", [False, True])
def test_other_layers_stay(
    model: Qwen3ForCausalLM, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32, and machines where the operators are not found."""
    if missing:
        model = model.to(torch.bfloat16)
        monkeypatch.setattr(prepacking, "can_prepack", lambda: False)
    before = types(model)
    with prepacked_linears(model):
        assert types(model) == before
