"""Plans: the real trainings on a fake GPU, and what fits on how many real ones."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqrae.common.config import load_config, shipped_config
from vqrae.common.dry_run import GIB, KNOWN_MODELS, Report, known_config
from vqrae.planning.backward import grad
from vqrae.planning.plan import plan, render
from vqrae.quickstart.pretrain_encoder import EncoderPretrainingConfig
from vqrae.quickstart.train_llm import TinyLLMConfig
from vqrae.scripts.cli import main

# More layers are more of the same.
SHALLOW = ["model.encoder_config.num_hidden_layers=2", "stage2.perceptual_network=lpips"]
SHALLOW.append("stage2.perceptual_mix=[]")


@pytest.mark.parametrize(
    ("name", "overrides", "networks"),
    [
        ("siglip2_256", ["stage=2", *SHALLOW], ["VQRAEModel", "PatchDiscriminator"]),
        ("understanding/tiny", ["stage=sft"], ["LlavaForConditionalGeneration"]),
        ("generation/tiny", [], ["Qwen3ForCausalLM"]),
        ("mllm/tiny", [], ["UnifiedModel"]),
    ],
)
def test_every_kind_of_training_has_a_plan(
    name: str, overrides: list[str], networks: list[str]
) -> None:
    [(report, flops)] = plan(name, overrides)
    assert [part for part, _, trained in report.parts if trained and part[0] != " "] == networks
    assert report.working_bytes > 0
    # At least 6 FLOPs for each trained weight and image or sequence.
    assert flops > 6 * report.trained * report.micro_batch_size
    needs = [report.memory(zero, 8) for zero in report.zeros]
    assert needs[1:] == sorted(needs[1:], reverse=True)


def test_what_the_quickstart_makes_is_known() -> None:
    path = shipped_config("vqrae.quickstart", "tiny_llm")
    llm = known_config("runs/llm")
    for key, value in load_config(TinyLLMConfig, path).model.items():
        assert key == "max_position_embeddings" or getattr(llm, key) == value
    path = shipped_config("vqrae.quickstart", "tiny_encoder")
    vision = load_config(EncoderPretrainingConfig, path).vision
    assert vision.items() <= KNOWN_MODELS["runs/encoder"].items()


def test_what_fits_keeps_the_global_batch() -> None:
    report = Report(
        name="job",
        samples="images",
        micro_batch_size=16,
        global_batch_size=64,
        max_steps=10,
        zero=2,
        checkpointing=False,
        half=True,
        working_bytes=16 * GIB,
        parameters=10**9,
        trained=10**9,
    )
    memory = (report.state_bytes(2, 4) / GIB + 15) / 0.92
    text = render(report, 1e12, gpus=[3, 4], gpu_memory=memory)
    assert "| 3 |" in text
    assert "does not divide" in text
    assert "micro-batch 8, accumulation 2" in text
    assert "4e+12 FLOPs a step, 4e+13 in 10" in text
    report.zero = 0
    assert "only zero=3" in render(report, 1e12, gpus=[64], gpu_memory=2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "is one of"),
        (["siglip_256"], "Did you mean"),
        (["understanding/tiny", "llm=no/such-model"], "no/such-model: not on this machine"),
        (["understanding/tiny", "tokenizer=runs/mine"], "no shipped configuration makes it"),
        (["understanding/tiny", "--gpus", "0"], "expected at least 1"),
        (["nowhere.yaml"], "does not exist"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_gradient_goes_no_further_than_it_is_asked_for() -> None:
    runs = []

    def block(x: Tensor, weight: Tensor) -> Tensor:
        runs.append(1)
        return torch.tanh(x @ weight).square()

    first, second, last = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(
        (block(block(first, first), second) @ last).square().mean(), (last, second, first)
    )
    hidden = checkpoint(block, first, first, use_reentrant=False)
    hidden = checkpoint(block, hidden, second, use_reentrant=False)
    loss = (hidden @ last).square().mean()
    for asked, gradient, repeated in zip((last, second, first), expected, (0, 1, 2), strict=True):
        runs.clear()
        [found] = grad(loss, asked)
        assert len(runs) == repeated
        torch.testing.assert_close(found, gradient)
