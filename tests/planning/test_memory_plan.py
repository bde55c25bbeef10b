"""Memory plans: real forward passes keep what was planned, published sizes come out, every shipped configuration is read."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vqrae.common.config import ConfigError
from vqrae.common.memory import GIB, PLANNING_ATTENTION, measure_activations, state_bytes
from vqrae.planning.empty_models import PUBLIC_MODELS
from vqrae.planning.memory_plan import READERS, Job, plan, render
from vqrae.scripts.cli import main

ROOT = Path(__file__).parents[2]
TRAININGS = sorted(
    f"{package}/{path.stem}"
    for package in READERS
    for path in (ROOT / package / "configs").glob("*.yaml")
    if path.stem not in ("tiny_llm", "tiny_encoder")
)


def llm(attention: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model("llama", vocab_size=64, num_key_value_heads=2, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def kept_bytes(model: nn.Module, *, checkpointing: bool) -> int:
    """What a real forward pass keeps, each storage once, parameters left out."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    parameters = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(2, 16, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(
        storage.nbytes() for address, storage in storages.items() if address not in parameters
    )


def planned(model: nn.Module):
    def forward() -> torch.Tensor:
        ids = torch.zeros(2, 16, dtype=torch.int64)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return measure_activations(forward, model)


def test_planned_activations_are_those_of_a_real_forward_pass() -> None:
    with torch.device("meta"):
        activations = planned(llm(PLANNING_ATTENTION))
    real = kept_bytes(llm("sdpa"), checkpointing=False)
    assert activations.whole == pytest.approx(
        real, rel=0.1
    )  # the CPU's fused kernel keeps a mask and a little more
    assert activations.checkpointed < 0.6 * activations.whole


def test_frozen_blocks_keep_nothing() -> None:
    with torch.device("meta"):
        model, frozen = llm(PLANNING_ATTENTION), llm(PLANNING_ATTENTION)
    frozen.requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    assert planned(frozen).whole < 0.3 * planned(model).whole


def test_state_under_every_zero_stage() -> None:
    assert [state_bytes(400, 100, zero=zero, gpus=4) for zero in range(4)] == [1600, 1100, 800, 500]
    # 16 bytes a parameter in mixed precision (ZeRO, 1910.02054, section 3.1), whatever is partitioned.
    assert (
        state_bytes(200, 100, zero=1, gpus=1, gradient_bytes=2)
        == state_bytes(200, 100, zero=3, gpus=1, gradient_bytes=2)
        == 1600
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("lmsys/vicuna-7b-v1.5", 6.738),
        ("lmsys/vicuna-13b-v1.5", 13.016),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345),
    ],
)
def test_public_models_have_their_published_sizes(name: str, billions: float) -> None:
    values = dict(PUBLIC_MODELS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("name", TRAININGS)
def test_every_shipped_training_has_a_plan(name: str) -> None:
    full_size_tokenizer = name.startswith("tokenizer/") and not name.endswith("tiny")
    for job in plan(
        name, ["model.encoder_config.num_hidden_layers=2"] if full_size_tokenizer else []
    ):  # more is more of it
        assert job.trained == sum(
            trained
            for key, (_, trained) in job.parts.items()
            if key in ("total", "tokenizer, total")
        ) + sum(trained for key, (_, trained) in job.parts.items() if key == "discriminator")
        needs = [job.memory(gpus=8, zero=zero) for zero in job.zeros]
        assert all(need > 0 for need in needs)
        assert needs[1:] == sorted(needs[1:], reverse=True)
        assert 0 < job.activations.checkpointed <= job.activations.whole


def job(**changes: object) -> Job:
    from vqrae.common.memory import Activations

    values: dict = {
        "name": "job",
        "parts": {"total": (10**9, 10**9)},
        "trained": 10**9,
        "weights": 4 * 10**9,
        "weights_under_zero": 2 * 10**9,
        "gradient_bytes": 2,
        "activations": Activations(whole=16 * GIB, checkpointed=8 * GIB),
        "checkpointing": False,
        "micro_batch_size": 16,
        "global_batch_size": 64,
        "zero": 2,
    }
    return Job(**{**values, **changes})


def test_what_fits_keeps_the_global_batch() -> None:
    whole = job()
    state = whole.memory(gpus=4, zero=2) - 16 * GIB
    assert whole.largest_micro_batch(gpus=4, zero=2, budget=state + 16 * GIB) == 16
    assert whole.largest_micro_batch(gpus=4, zero=2, budget=state + 15 * GIB) == 8
    assert whole.largest_micro_batch(gpus=4, zero=2, budget=state) is None
    assert whole.largest_micro_batch(gpus=3, zero=2, budget=1e15) is None
    assert job(checkpointing=True).memory(gpus=4, zero=2) == state + 8 * GIB
    text = render(whole, gpus=[3, 4], gpu_memory=(state + 15 * GIB) / GIB / 0.92)
    assert "| 3 |" in text
    assert "does not divide" in text
    assert "micro-batch 8, accumulation 2" in text
    assert "only zero=3" in render(job(zero=0), gpus=[64], gpu_memory=2.5)


def test_command_names_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "understanding/tiny", "sft.micro_batch_size=8", "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    assert "understanding, pretrain: global batch 32, micro-batch 32" in text
    assert "understanding, sft: global batch 32, micro-batch 8" in text
    assert text.count("\n| 2 |") == 2
    for command, message in (
        (["tiny"], "is one of"),
        (["siglip_256"], "Did you mean"),
        (["tiny_llm"], "there is nothing to plan"),
        (
            ["understanding/tiny", "llm=no/such-model"],
            "language model no/such-model: not on this machine",
        ),
        (["understanding/tiny", "tokenizer=runs/mine"], "no shipped configuration makes it"),
        (["understanding/tiny", "--gpus", "0"], "expected positive numbers"),
    ):
        assert main(["plan", *command]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="does not exist"):
        plan("nowhere.yaml")
