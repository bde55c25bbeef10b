import copy

import pytest
import timm.optim.muon
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from vqrae.common.optim import Muon, muon_groups, warmup_cosine
from vqrae.common.trainer import OptimizationConfig, build_optimizers


def tiny_llm(*, tied: bool) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=24, tie_word_embeddings=tied, **sizes, **heads))


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_go_to_muon_and_everything_else_to_adamw(tied: bool) -> None:
    model = tiny_llm(tied=tied)
    model.model.norm.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = muon_groups(model, weight_decay=0.1)
    assert {names[id(p)].rsplit(".", 2)[-2] for p in matrices["params"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert rest["use_fallback"]
    assert rest["weight_decay"] == 0
    found = {names[id(p)] for p in (*matrices["params"], *rest["params"])}
    assert found == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.embed_tokens.weight" in {names[id(p)] for p in rest["params"]}


def test_updates_of_matrices_are_orthogonal_and_sized_like_those_of_adamw() -> None:
    layer = nn.Linear(64, 64, bias=False)
    before = layer.weight.detach().clone()
    layer(torch.randn(256, 64)).square().sum().backward()
    Muon([{"params": [layer.weight]}], lr=0.01).step()
    update = before - layer.weight.detach()
    singular = torch.linalg.svdvals(update)
    # Five Newton-Schulz steps leave them between 0.7 and 1.2 of their mean.
    assert singular.max() / singular.min() < 3
    # AdamW's updates have a root mean square of 0.2 to 0.4 rates.
    assert 0.1 < update.square().mean().sqrt() / 0.01 < 0.4


def test_matrices_of_one_shape_step_together_as_they_would_alone() -> None:
    model = nn.ModuleList([tiny_llm(tied=True), nn.Conv2d(3, 16, 4), nn.Conv2d(3, 16, 4)])
    alone = copy.deepcopy(model)
    optimizers = []
    for kind, each in ((Muon, model), (timm.optim.muon.Muon, alone)):
        groups = muon_groups(each, weight_decay=0.1)
        groups[0]["params"] += [each[1].weight, each[2].weight]
        groups[1]["params"] = [p for p in groups[1]["params"] if p.ndim != 4]
        optimizers.append(kind(groups, lr=0.01, nesterov=True))
    for _ in range(3):
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_step_that_is_told_to_skip_changes_nothing() -> None:
    layer = nn.Linear(8, 8)
    fallback = {"params": [layer.bias], "use_fallback": True}
    optimizer = Muon([{"params": [layer.weight]}, fallback], lr=0.01)
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    weights = copy.deepcopy(layer.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close(layer.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(layer.weight, weights["weight"])


@pytest.mark.parametrize(
    ("name", "zero", "expected"), [("adamw", 0, None), ("muon", 0, Muon), ("muon", 2, None)]
)
def test_zero_takes_adamw(
    name: str, zero: int, expected: type | None, capsys: pytest.CaptureFixture
) -> None:
    sizes = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    config = OptimizationConfig(**sizes, learning_rate=1e-3, optimizer=name, zero=zero)
    optimizer, scheduler = build_optimizers(config, tiny_llm(tied=True))
    assert scheduler is None
    assert optimizer is None if expected is None else isinstance(optimizer, expected)
    assert ("adamw, not muon" in capsys.readouterr().out) == (name == "muon" and zero > 0)


def test_schedule_ends_where_it_should() -> None:
    factors = [warmup_cosine(step, warmup_steps=4, total_steps=20, end=0.1) for step in range(20)]
    assert 0 < factors[0] < factors[3] < factors[4] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
