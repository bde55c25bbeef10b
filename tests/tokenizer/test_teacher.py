"""The teacher is the original encoder: at the start of stage 2, on every relaunch, and after a stage 1 that tunes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.configuration import FEATURE_TAPS
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.losses import distillation_loss
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.stage import StageTrainer
from vqrae.tokenizer.teacher import original_encoder

STAGES = [
    f"stage{n}.{pair}"
    for n in (1, 2)
    for pair in ("max_steps=2", "global_batch_size=4", "micro_batch_size=4", "encoder_lr=0.1")
]
Weights = dict[str, torch.Tensor]
Run = Callable[..., None]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Weights, Weights]]:
    """Stage, teacher and student of every stage that starts training from now on."""
    seen: list[tuple[int, Weights, Weights]] = []
    train = StageTrainer.train

    def note(trainer: StageTrainer) -> None:
        teacher = {} if trainer.teacher is None else copied(trainer.teacher.state_dict())
        train(trainer)
        seen.append((trainer.number, teacher, copied(trainer.model.encoder.state_dict())))

    monkeypatch.setattr(StageTrainer, "train", note)
    return seen


def copied(weights: Weights) -> Weights:
    return {key: value.clone() for key, value in weights.items()}


def equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


@pytest.fixture
def run(tiny_run: list[str], tmp_path: Path) -> Run:
    return lambda *more: tokenizer_train.main(
        [*tiny_run, *STAGES, "save_steps=1", "bf16=false", f"output_dir={tmp_path}", *more]
    )


@pytest.mark.parametrize("freeze", ["true", "false"])
def test_every_launch_learns_from_the_original(
    freeze: str, tmp_path: Path, run: Run, started: list
) -> None:
    options = [f"stage1.freeze_encoder={freeze}", "stage1.distillation_weight=1"]
    run(*options)
    for stage in (1, 2):  # a crash behind the checkpoint of the first step
        shutil.rmtree(tmp_path / f"stage{stage}" / "model")
        run(*options, f"stage={stage}")
    assert [number for number, _, _ in started] == [1, 2, 1, 2]
    original = started[0][1]
    assert all(equal(teacher, original) for _, teacher, _ in started)
    first, second, *resumed = [student for _, _, student in started]
    assert equal(first, original) == (freeze == "true")
    assert not equal(second, first)
    assert equal(resumed[0], first)
    assert equal(resumed[1], second)
    assert (tmp_path / "stage1" / "original_encoder.safetensors").exists() == (freeze == "false")


def test_a_stage_1_from_scratch_forgets_the_encoder_of_another(
    tmp_path: Path, run: Run, started: list
) -> None:
    file = tmp_path / "stage1" / "original_encoder.safetensors"
    run("stage1.freeze_encoder=false", "stage=1")
    for results in (
        "model",
        "stage1/model",
        "stage1/step-1",
    ):  # with which other settings would be refused
        shutil.rmtree(tmp_path / results)
    assert file.exists()
    run("seed=1")
    assert not file.exists()
    assert equal(started[2][1], started[1][2])


def test_no_teacher_without_a_use_for_it(run: Run, started: list) -> None:
    options = [
        "perceptual_weight=1.1",
        "perceptual_network=lpips+convnext_s",
        "perceptual_mix=[1.0, 0.1]",
        "max_steps=1",
    ]
    options += ["global_batch_size=1", "micro_batch_size=1"]
    run("stage=1", "random_perceptual_weights=true", *(f"stage1.{option}" for option in options))
    assert started[0][1] == {}


@pytest.mark.parametrize("tap", FEATURE_TAPS)
@pytest.mark.parametrize("encoder", ["siglip", "internvit"])
def test_teacher_and_student_read_one_tap(
    encoder: str, tap: str, make_tokenizer: Callable[..., VQRAEModel]
) -> None:
    model = make_tokenizer(encoder, feature_tap=tap).train()
    teacher = original_encoder(model.encoder, Path("nowhere"))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.rand(2, 3, model.config.image_size, model.config.image_size)
    target = encoder_features(teacher, model.normalize(images), tap)
    features = model(images).features
    assert distillation_loss(features, target) == 0
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.5)
    features = model(images).features
    expected = (
        features - target
    ).square().sum() / target.numel()  # VQRAE Eq. 5 as a mean over all elements
    torch.testing.assert_close(distillation_loss(features, target), expected)
    assert expected > 0


@torch.no_grad()
def test_a_teacher_of_half_the_size_has_the_same_features(tokenizer: VQRAEModel) -> None:
    teacher = original_encoder(tokenizer.encoder, Path("nowhere"), bf16=True)
    size = tokenizer.config.image_size
    pixel_values = torch.randn(2, 3, size, size)
    encoders = (tokenizer.encoder, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (
            encoder_features(encoder, pixel_values, "hidden_states[-1]") for encoder in encoders
        )
    assert torch.equal(expected, found)
    large, small = (
        sum(p.numel() * p.element_size() for p in encoder.parameters()) for encoder in encoders
    )
    assert small < 0.65 * large
