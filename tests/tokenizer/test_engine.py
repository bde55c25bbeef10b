"""What the engine adds to the loop: less memory, compiled blocks, skipped steps, a dry run."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizer_trainings import EVERYTHING, equal, read
from torch import nn

from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.dry_run import rehearsal
from vqrae.tokenizer.engine import clip_gradients, compile_blocks
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.train_state import LossWindow, SkippedSteps, WeightAverage

ENCODER = (
    "{model_type: internvl_vision, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,"
    " num_attention_heads: 2, image_size: [56, 56], patch_size: [14, 14]}"
)
# A tokenizer of InternViT's kind that decodes more pixels than it sees.
ARGUMENTS = [
    "model.encoder=", f"model.encoder_config={ENCODER}", "model.codebook_size=64",
    "model.codebook_dim=32", "model.feature_norm=none", "model.codebook_init=random",
    "model.output_patch_size=16", "stage=2", "stage2.global_batch_size=4",
    "stage2.micro_batch_size=2", "stage2.bypass_steps=0", "stage2.distillation_weight=1.0",
    "stage2.adversarial_weight=0.1", "stage2.discriminator_lr=1e-3",
    "stage2.discriminator_channels=[8, 16, 16]", "ema_decay=0.9",
]  # fmt: skip


def gradients(model: VQRAEModel) -> dict[str, torch.Tensor]:
    size = model.config.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    output = model.train()(images)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_leaves_gradients_as_they_are(tokenizer: VQRAEModel) -> None:
    recomputing = copy.deepcopy(tokenizer)
    recomputing.activation_checkpointing_enable()
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    for blocks in (recomputing.encoder.encoder, recomputing.decoder.blocks):
        mlps = [module for name, module in blocks.named_modules() if name.endswith("mlp")]
        mlps[0].register_forward_pre_hook(count)
    assert equal(gradients(tokenizer), gradients(recomputing))
    # The first block of encoder and decoder, each a second time in the backward pass.
    assert forwards == 4


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same(
    make_tokenizer: Callable[..., VQRAEModel], checkpointing: bool
) -> None:
    model, compiled = make_tokenizer(), make_tokenizer()
    if checkpointing:
        compiled.activation_checkpointing_enable()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled, backend="aot_eager")
    expected, found = gradients(model), gradients(compiled)
    torch.testing.assert_close(found, expected)
    # Not one for each of the four blocks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert compiled.state_dict().keys() == model.state_dict().keys()
    torch._dynamo.reset()


# ---- the guard


def test_a_left_out_step_changes_nothing() -> None:
    engine, skipped = Accelerator(cpu=True), SkippedSteps()
    module = nn.Linear(3, 2)
    raw = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    module, optimizer = engine.prepare(module, raw)

    def step(scale: float) -> torch.Tensor:
        (module(torch.ones(1, 3)).sum() * scale).backward()
        norm = clip_gradients(engine, optimizer, module, 1.0)
        skipped.update(norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def state() -> list[torch.Tensor]:
        moments = [slot[name] for slot in raw.state.values() for name in sorted(slot)]
        return [tensor.detach().clone() for tensor in (*module.parameters(), *moments)]

    assert step(1.0).isfinite()
    before = state()
    for scale in (float("nan"), float("inf")):
        assert step(scale).isnan()
    assert all(map(torch.equal, before, state()))
    assert (skipped.total, skipped.in_a_row) == (2, 2)
    step(1.0)
    assert not any(map(torch.equal, before, state()))
    assert (skipped.total, skipped.in_a_row) == (2, 0)


# ---- what is averaged


def test_weight_average(make_tokenizer: Callable[..., VQRAEModel]) -> None:
    model = make_tokenizer()
    average = WeightAverage(model, decay=0.15)
    expected: torch.Tensor = torch.zeros(())
    for t, decay in enumerate((0, 1 / 10, 0.15)):  # a copy, then (1 + t) / (10 + t) up to the decay
        with torch.no_grad():
            model.in_proj.weight += 1
            model.quantizer.codebook += 1
        average.update(model)
        weight = model.in_proj.weight.detach().clone()
        expected = torch.lerp(expected, weight, 1 - decay) if t else weight
    torch.testing.assert_close(average.model.in_proj.weight, expected)
    # Buffers are not averaged.
    assert torch.equal(average.model.quantizer.codebook, model.quantizer.codebook)


def test_a_loss_window_passes_over_what_is_not_finite() -> None:
    window = LossWindow()
    for value in (1.0, float("nan"), 3.0):
        window.update({"loss": torch.tensor(value, requires_grad=True)})
    window.update({"late": torch.tensor(5.0)})
    window.gather(Accelerator(cpu=True))
    assert window.means() == {"loss": 2.0, "late": 5.0}
    assert not any(total.requires_grad for total in window.state_dict().values())


# ---- the dry run


def test_a_dry_run_reports_and_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny", *ARGUMENTS, "micro_batch_size=1", "data.train=no/such/folder"]
    arguments += ["ema_decay=0", "model.encoder=nobody/has-this"]
    tokenizer_train.main([*arguments, "dry_run=2", f"output_dir={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    networks = [f"\n  {part} " for part in ("VQRAEModel", "PatchDiscriminator", "  encoder")]
    figures = ["2 steps of 1 images", "peak memory", "seconds per step", "zero=2"]
    figures += ["700 steps of 4 = 2,800 images", "a checkpoint of", "(feature_tap of this run)"]
    for line in (*networks, *figures):
        assert line in printed
    # A tuned encoder has a teacher, which would be kept.
    tuned = ["stage1.freeze_encoder=false", "stage1.encoder_lr=1e-3", "stage=1", "dry_run=1"]
    tokenizer_train.main([*arguments, *tuned, f"output_dir={tmp_path / 'new' / 'run'}"])
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_leaves_out_nothing_that_costs() -> None:
    config = read("siglip2_256", "dry_run=3", "micro_batch_size=2")
    short = rehearsal(config, 2)
    stage = short.stage_config(2)
    assert (stage.global_batch_size, stage.micro_batch_size) == (2, 2)
    assert stage.discriminator_start == 0  # judged from the first step on
    assert stage.perceptual_weight == 1.1
    assert short.random_perceptual_weights
    assert short.data.train == "scenes"
    assert short.model.encoder is None  # known by its configuration
    assert short.model.encoder_config == config.model.encoder_config


def test_flash_attention_gets_no_fp32_work(flash_attention: str, tmp_path: Path) -> None:
    """Statistics, codebook start, pixel metric, previews, average and resume."""
    steps = ["stage1.max_steps=1", "stage2.max_steps=3", "sample_steps=1"]
    arguments = [*EVERYTHING, *steps, f"attention={flash_attention}"]
    arguments.append(f"output_dir={tmp_path / 'run'}")
    tokenizer_train.main(arguments)
    for folder in ("model", "stage2/model"):
        shutil.rmtree(tmp_path / "run" / folder)
    tokenizer_train.main(arguments)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    with pytest.raises(ValueError, match="set bf16=true"):
        tokenizer_train.main([*arguments, "bf16=false", f"output_dir={tmp_path / 'other'}"])
