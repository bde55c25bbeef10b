"""The adversarial part of a stage: discriminators, their schedule, their statistics, on one and on two processes.

Run as a script, this file trains and writes what the discriminator of its process looks like at the end.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModel, Dinov2Config, PreTrainedModel, ViTConfig

from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.config import StageConfig
from vqrae.tokenizer.discriminator import (
    DinoDiscriminator,
    PatchDiscriminator,
    build_discriminator,
    frozen,
    pretrained_vit,
)
from vqrae.tokenizer.guard import SkippedSteps
from vqrae.tokenizer.losses import LeCam, generator_hinge_loss
from vqrae.tokenizer.stage import StageTrainer

# Two micro-batches in a step; the discriminator runs in the last two of four steps.
ADVERSARIAL = [
    *(f"stage{n}.{pair}" for n in (1, 2) for pair in ("global_batch_size=8", "micro_batch_size=4")),
    "stage1.max_steps=1",
    "stage2.max_steps=4",
    "stage2.adversarial_weight=0.1",
    "stage2.discriminator_lr=1e-2",
    "stage2.discriminator_start=2",
    "stage2.discriminator_channels=[8, 16, 16]",
]


def vit(kind: type = ViTConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    if kind is ViTConfig:
        options["intermediate_size"] = 64
    return AutoModel.from_config(kind(**options))


# ---- when it runs


def test_not_run_before_its_start(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | int] = []
    set_learning_rates, forward = StageTrainer.set_learning_rates, PatchDiscriminator.forward

    def note_step(trainer: StageTrainer, step: int) -> None:
        seen.append(step)
        set_learning_rates(trainer, step)

    def note_run(discriminator: PatchDiscriminator, images: torch.Tensor) -> torch.Tensor:
        seen.append("run")
        return forward(discriminator, images)

    monkeypatch.setattr(StageTrainer, "set_learning_rates", note_step)
    monkeypatch.setattr(PatchDiscriminator, "forward", note_run)
    tokenizer_train.main([*tiny_run, *ADVERSARIAL, f"output_dir={tmp_path}"])
    twice_in_a_micro_batch = ["run"] * 4
    assert seen == [0, 0, 1, 2, *twice_in_a_micro_batch, 3, *twice_in_a_micro_batch]


def test_weight_ramps_in_and_learning_rate_counts_its_own_steps() -> None:
    stage = StageConfig(
        global_batch_size=1,
        micro_batch_size=1,
        freeze_encoder=True,
        adversarial_weight=0.1,
        discriminator_start=50,
        discriminator_ramp=4,
        discriminator_lr=4e-5,
        decoder_lr=1e-4,
        end_lr=1e-5,
        warmup_steps=10,
        max_steps=100,
    )
    tokenizer, discriminator = (SimpleNamespace(param_groups=[{"lr": 0.0}]) for _ in range(2))
    trainer = SimpleNamespace(
        stage=stage, base_rates=[1e-4], optimizer=tokenizer, d_optimizer=discriminator
    )
    assert [stage.adversarial_ramp(step) for step in range(50, 56)] == [0.25, 0.5, 0.75, 1, 1, 1]

    def rate(step: int) -> float:
        StageTrainer.set_learning_rates(trainer, step)
        return discriminator.param_groups[0]["lr"]

    assert rate(49) == 0  # untouched
    assert rate(50) == pytest.approx(4e-5 / 11)  # the first step of its own warm-up
    assert rate(60) == pytest.approx(4e-5)
    assert rate(99) == pytest.approx(4e-6)


# ---- which way it pulls


def test_discriminator_step_parts_real_from_reconstruction() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator((8, 16, 16))
    engine = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = engine.prepare(
        discriminator, torch.optim.AdamW(discriminator.parameters(), 1e-3, fused=True)
    )
    trainer = SimpleNamespace(
        d_engine=engine,
        d_wrapped=wrapped,
        discriminator=discriminator,
        d_optimizer=optimizer,
        d_skipped=SkippedSteps(),
        lecam=LeCam(),
        stage=SimpleNamespace(lecam_weight=0.001, max_grad_norm=1.0),
        autocast=nullcontext,
    )
    images = torch.rand(2, 3, 32, 32)
    reconstruction = images.mean((2, 3), keepdim=True).expand_as(images)
    means = []
    for micro in range(40):
        real, fake = (discriminator(x).mean() for x in (images, reconstruction))
        means.append(torch.stack([real, fake]).detach())
        before = torch.stack([trainer.lecam.real_mean, trainer.lecam.fake_mean])
        StageTrainer.discriminator_step(trainer, images, reconstruction)
        after = torch.stack([trainer.lecam.real_mean, trainer.lecam.fake_mean])
        # The statistics move once in a step, by the mean over its micro-batches.
        expected = (
            before if micro % 2 == 0 else 0.999 * before + 0.001 * torch.stack(means[-2:]).mean(0)
        )
        torch.testing.assert_close(after, expected)
    assert real > fake + 0.5


@pytest.mark.parametrize("name", ["maskbit", "dino"])
def test_generator_follows_the_discriminator_and_leaves_it_alone(name: str) -> None:
    torch.manual_seed(0)
    discriminator = (
        PatchDiscriminator((8, 16, 16)) if name == "maskbit" else DinoDiscriminator(vit())
    )
    trained = [
        key for key, parameter in discriminator.named_parameters() if parameter.requires_grad
    ]
    reconstruction = torch.rand(2, 3, 64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), frozen(discriminator):
        logits = discriminator(reconstruction)
    assert logits.dtype == torch.float32
    generator_hinge_loss(logits).backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert trained == [
        key for key, parameter in discriminator.named_parameters() if parameter.requires_grad
    ]
    with torch.no_grad():
        step = 0.1 * reconstruction.grad / reconstruction.grad.norm()
        assert (
            discriminator.eval()(reconstruction - step).mean()
            > discriminator(reconstruction).mean()
        )


def test_images_are_judged_one_by_one() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, 64, 64)
    for discriminator in (PatchDiscriminator((8, 16, 16)).eval(), DinoDiscriminator(vit()).eval()):
        torch.testing.assert_close(
            discriminator(images)[:1], discriminator(images[:1]), rtol=1e-4, atol=1e-5
        )


# ---- DINO


@pytest.mark.parametrize("kind", [ViTConfig, Dinov2Config])
def test_dino_trains_only_its_normalised_heads(kind: type) -> None:
    discriminator = DinoDiscriminator(vit(kind)).train()
    assert not discriminator.backbone.training
    logits = discriminator(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 4, 16)
    logits.sum().backward()
    trained = {
        key.split(".")[0]
        for key, parameter in discriminator.named_parameters()
        if parameter.grad is not None
    }
    assert trained == {"heads"}
    convolutions = [module for module in discriminator.modules() if isinstance(module, nn.Conv1d)]
    assert len(convolutions) == 4 * 3
    for _ in range(30):  # one power iteration for each run
        discriminator(torch.rand(1, 3, 64, 64))
    for convolution in convolutions:
        norm = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2)
        torch.testing.assert_close(norm, torch.ones(()), rtol=0.05, atol=0)


def test_dino_reads_four_depths_of_vit_s() -> None:
    with torch.device("meta"):
        discriminator = build_discriminator("dino", channels=(), random_backbone=True)
    assert isinstance(discriminator, DinoDiscriminator)
    assert discriminator.depths == [3, 6, 9, 12]
    assert sum(p.numel() for p in discriminator.backbone.parameters()) == pytest.approx(
        21.67e6, rel=1e-3
    )  # ViT-S/16


def test_a_backbone_is_never_partly_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    backbone = vit()
    backbone.save_pretrained(tmp_path)
    found = pretrained_vit(str(tmp_path))
    assert all(
        torch.equal(value, backbone.state_dict()[key]) for key, value in found.state_dict().items()
    )
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in state if "layer.2" in key or "layers.2" in key)
    save_file(
        {key: value for key, value in state.items() if key != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="lacks 1 weights, the first is"):
        pretrained_vit(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set discriminator_backbone to it") as error:
        build_discriminator("dino", channels=())
    assert "random_perceptual_weights=true" in str(error.value)
    with pytest.raises(ValueError, match="Did you mean 'dino'"):
        build_discriminator("dinov2", channels=())


# ---- two processes


@pytest.mark.slow
def test_two_processes_share_one_discriminator(tiny_run: list[str], tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "vit")
    options = [
        "stage2.discriminator=dino",
        f"stage2.discriminator_backbone={tmp_path / 'vit'}",
        f"output_dir={tmp_path}",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *tiny_run, *ADVERSARIAL, *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first.pop("image"), second.pop("image"))  # each saw images of its own
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["real_mean"] != 0
    assert any("heads" in key for key in first)


def write_discriminator(argv: list[str]) -> None:
    step = StageTrainer.discriminator_step
    seen: dict[str, torch.Tensor] = {}

    def note(
        trainer: StageTrainer, images: torch.Tensor, reconstruction: torch.Tensor
    ) -> torch.Tensor:
        loss = step(trainer, images, reconstruction)
        seen.update(
            trainer.discriminator.state_dict() | trainer.lecam.state_dict() | {"image": images[0]}
        )
        return loss

    StageTrainer.discriminator_step = note  # type: ignore[method-assign]
    tokenizer_train.main(argv)
    output = argv[-1].removeprefix("output_dir=")
    torch.save(
        {key: value.clone() for key, value in seen.items()}, f"{output}/rank{os.environ['RANK']}.pt"
    )


if __name__ == "__main__":
    write_discriminator(sys.argv[1:])
