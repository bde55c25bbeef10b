import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, eager_attention_forward

from vqrae.common.lean import LeanRMSNorm, lean_attention, make_lean

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_attention_is_that_of_transformers(half: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, **SIZES, **HEADS))
    module = model.model.layers[0].self_attn
    states = [torch.randn(2, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2)]
    mask = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1).repeat(2, 1, 1, 1)
    mask[0, :, 0] = mask.min()  # a row of padding sees nothing
    expected = []
    for attention in (eager_attention_forward, lean_attention):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output, weights = attention(module, *states, mask, scaling=0.3)
        gradients = torch.autograd.grad(output.float().square().sum(), states)
        results = [output, weights, *gradients]
        expected = expected or results
    for found, wanted in zip(results, expected, strict=True):
        assert (found - wanted).float().norm() < tolerance * wanted.float().norm()


def test_attention_that_is_not_plain_is_refused() -> None:
    states = [torch.randn(1, 2, 3, 4)] * 3
    with pytest.raises(ValueError, match=r"got Linear, .* set attention to sdpa"):
        lean_attention(torch.nn.Linear(1, 1), *states, None, scaling=1.0, softcap=30.0)


def test_norms_and_their_gradients_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=24, **SIZES, **HEADS))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    lean = copy.deepcopy(model)
    make_lean(lean)
    assert not any(type(module) is Qwen3RMSNorm for module in lean.modules())
    assert sum(isinstance(module, LeanRMSNorm) for module in lean.modules()) == 9
    ids = torch.randint(24, (3, 7))
    for each in (model, lean):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        read = lean.model.layers[0].input_layernorm(torch.randn(2, 32))
        last = lean.model.norm(torch.randn(2, 32))
    assert (read.dtype, last.dtype) == (torch.bfloat16, torch.float32)
