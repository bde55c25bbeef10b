"""Loss terms, the discriminators and their schedule, the teacher."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizer_trainings import TINY, equal, read
from torch import Tensor, nn
from transformers import AutoModel, Dinov2Config, PreTrainedModel, ViTConfig

from vqrae.common.run import open as open_run
from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.configuration import FEATURE_TAPS
from vqrae.tokenizer.discriminator import (
    BlurDownsample,
    DinoDiscriminator,
    PatchDiscriminator,
    build_discriminator,
    frozen,
    pretrained_vit,
)
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.losses import (
    LeCam,
    build_teacher,
    discriminator_hinge_loss,
    distillation_loss,
    generator_hinge_loss,
)
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.train import train_stage


def test_hinge_by_hand() -> None:
    real = torch.tensor([0.5, 2.0, -1.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    loss = discriminator_hinge_loss(real, fake)
    torch.testing.assert_close(loss.item(), 0.5 * ((0.5 + 0 + 2) / 3 + (0 + 1 + 3) / 3))
    loss.backward()
    assert real.grad.sign().tolist() == [-1, 0, -1]
    assert fake.grad.sign().tolist() == [0, 1, 1]
    assert generator_hinge_loss(torch.tensor([1.0, 2.0, 6.0])) == -3


def test_lecam_steers_logits_towards_the_mean_of_the_other_class() -> None:
    lecam = LeCam(decay=0.5)
    lecam.update(torch.tensor([0.8, -1.2]), taken=torch.tensor(True))
    lecam.update(torch.tensor([float("nan"), 1.0]), taken=torch.tensor(False))  # a skipped step
    torch.testing.assert_close(
        lecam.state_dict(), {"real_mean": torch.tensor(0.4), "fake_mean": torch.tensor(-0.6)}
    )
    real = torch.tensor([0.1, 0.5], requires_grad=True)
    fake = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = lecam(real, fake)
    # The second term is off: fake is above the mean of the real.
    torch.testing.assert_close(loss.item(), (0.3 + 0.6) ** 2)
    loss.backward()
    torch.testing.assert_close(real.grad, torch.full((2,), 2 * 0.9 / 2))
    assert (fake.grad == 0).all()
    torch.testing.assert_close(lecam(real, torch.tensor([-0.5])).item(), 0.9**2 + 0.9**2)


# ---- when the discriminator runs, and what it learns


def test_the_discriminator_counts_its_own_steps() -> None:
    options = ["max_steps=100", "warmup_steps=10", "decoder_lr=1e-4", "end_lr=1e-5"]
    options += ["adversarial_weight=0.1", "discriminator_lr=4e-5", "discriminator_start=50"]
    options += ["discriminator_ramp=4"]
    stage = read("tiny", *(f"stage1.{option}" for option in options)).stage1
    weights = [stage.adversarial_weight_at(step) for step in range(48, 56)]
    assert weights == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    factors = [stage.discriminator_rate_factor(step) for step in (50, 60, 99)]
    assert factors == pytest.approx([1 / 11, 1, 0.1])  # its own warm-up and cosine


def test_not_run_before_its_start_then_parts_images_from_reconstructions(tmp_path: Path) -> None:
    """Two micro-batches in a step; the discriminator starts in the third step."""
    options = ["global_batch_size=4", "micro_batch_size=2", "max_steps=23", "revival_interval=0"]
    options += ["adversarial_weight=1e-9", "discriminator_lr=1e-3", "discriminator_start=2"]
    options += ["discriminator_channels=[8, 16, 16]"]
    config = read(*TINY, "bf16=false", *(f"stage1.{option}" for option in options))
    spies = {"autospec": True, "side_effect": PatchDiscriminator.forward}
    with (
        mock.patch.object(PatchDiscriminator, "forward", **spies) as forward,
        mock.patch.object(LeCam, "update", autospec=True) as update,
    ):
        steps = train_stage(config, 1, build_tokenizer(config.model, "eager"), open_run(tmp_path))
        calls = [(forward.call_count, update.call_count) for _ in itertools.islice(steps, 23)]
    # Both networks run it in every micro-batch; LeCam's means move once in a step.
    assert calls[:5] == [(0, 0), (0, 0), (0, 0), (4, 1), (8, 2)]
    real, fake = torch.stack([call.args[1] for call in update.call_args_list]).T
    assert (real - fake)[-1] > (real - fake)[0] + 0.1


# ---- discriminators


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


@pytest.fixture(params=["maskbit", "dino"])
def discriminator(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return (
        PatchDiscriminator((8, 16, 16)) if request.param == "maskbit" else DinoDiscriminator(vit())
    )


def test_generator_follows_the_discriminator_and_leaves_it_alone(discriminator: nn.Module) -> None:
    trained = [parameter.requires_grad for parameter in discriminator.parameters()]
    reconstruction = torch.rand(2, 3, 64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), frozen(discriminator):
        logits = discriminator(reconstruction)
    assert logits.dtype == torch.float32
    generator_hinge_loss(logits).backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert trained == [parameter.requires_grad for parameter in discriminator.parameters()]
    with torch.no_grad():
        before = discriminator.eval()(reconstruction)
        step = 0.1 * reconstruction.grad / reconstruction.grad.norm()
        assert discriminator(reconstruction - step).mean() > before.mean()
        # Images are judged one by one.
        alone = discriminator(reconstruction[:1])
    torch.testing.assert_close(before[:1], alone, rtol=1e-4, atol=1e-5)


def test_discriminators_have_their_published_size_shape_and_blur() -> None:
    with torch.device("meta"):
        titok, maskbit = PatchDiscriminator(), PatchDiscriminator((128, 128, 256, 512, 1024))
        dino = build_discriminator("dino", channels=(), random_backbone=True)
    assert sum(p.numel() for p in titok.parameters()) == 1_909_889  # published: 1.91 M
    assert sum(p.numel() for p in maskbit.parameters()) == 7_431_297  # 7.43 M
    assert isinstance(dino, DinoDiscriminator)
    assert dino.depths == [3, 6, 9, 12]
    assert dino.backbone.num_parameters() == pytest.approx(21.67e6, rel=1e-3)  # ViT-S/16
    logits = PatchDiscriminator((8, 16, 16))(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 1, 16, 16)
    blurred = BlurDownsample(4)(torch.full((1, 4, 8, 8), 0.7))[..., 1:-1, 1:-1]
    torch.testing.assert_close(blurred, torch.full((1, 4, 2, 2), 0.7))


@pytest.mark.parametrize("kind", [ViTConfig, Dinov2Config])
def test_dino_trains_only_its_normalised_heads(kind: type) -> None:
    discriminator = DinoDiscriminator(vit(kind)).train()
    assert not discriminator.backbone.training
    logits = discriminator(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 4, 16)
    logits.sum().backward()
    gradients = {key for key, p in discriminator.named_parameters() if p.grad is not None}
    assert {key.split(".")[0] for key in gradients} == {"heads"}
    convolutions = [module for module in discriminator.modules() if isinstance(module, nn.Conv1d)]
    assert len(convolutions) == 4 * 3
    for _ in range(30):  # one power iteration in each run
        discriminator(torch.rand(1, 3, 64, 64))
    for convolution in convolutions:
        norm = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2)
        torch.testing.assert_close(norm, torch.ones(()), rtol=0.05, atol=0)


def test_a_backbone_is_never_partly_random(tmp_path: Path) -> None:
    backbone = vit()
    backbone.save_pretrained(tmp_path)
    assert equal(pretrained_vit(str(tmp_path)).state_dict(), backbone.state_dict())
    state = backbone.state_dict()
    del state[next(key for key in state if "layer.2" in key or "layers.2" in key)]
    backbone.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights, the first is"):
        pretrained_vit(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set discriminator_backbone to it") as error:
        build_discriminator("dino", channels=())
    assert "random_perceptual_weights=true" in str(error.value)
    with pytest.raises(ValueError, match="Did you mean 'dino"):
        build_discriminator("dinov3", channels=())


# ---- the teacher


Weights = dict[str, Tensor]
Run = Callable[..., tuple[Weights, Weights]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Trains one stage for two steps, and gives its teacher and its encoder."""
    teachers: list[Weights] = []
    build = tokenizer_train.build_loss_networks

    def note(*args: Any) -> Any:
        networks = build(*args)
        teacher = networks.teacher
        weights = {} if teacher is None else teacher.state_dict()
        teachers.append({key: value.clone() for key, value in weights.items()})
        return networks

    monkeypatch.setattr(tokenizer_train, "build_loss_networks", note)
    arguments = [*TINY, "save_steps=1", "bf16=false", f"output_dir={tmp_path}"]
    arguments += ["model.codebook_init=random", "model.feature_norm=none", "stage2.bypass_steps=0"]
    stage = ["max_steps=2", "global_batch_size=2", "micro_batch_size=2", "encoder_lr=0.1"]
    for number in (1, 2):
        arguments += [f"stage{number}.{pair}" for pair in (*stage, "revival_interval=0")]

    def train(number: int, *more: str) -> tuple[Weights, Weights]:
        tokenizer_train.main([*arguments, f"stage={number}", *more])
        model = VQRAEModel.from_pretrained(tmp_path / f"stage{number}" / "model")
        return teachers[-1], model.encoder.state_dict()

    return train


@pytest.mark.parametrize("freeze", [True, False])
def test_every_launch_learns_from_the_original(freeze: bool, tmp_path: Path, run: Run) -> None:
    options = [f"stage1.freeze_encoder={freeze}", "stage1.distillation_weight=1"]
    original, first = run(1, *options)
    teacher, second = run(2, *options)
    assert equal(teacher, original)
    assert equal(first, original) == freeze
    assert not equal(second, first)
    for number, encoder in ((1, first), (2, second)):  # a crash after the checkpoint of step 1
        shutil.rmtree(tmp_path / f"stage{number}" / "model")
        teacher, resumed = run(number, *options)
        assert equal(teacher, original)
        assert equal(resumed, encoder)
    assert (tmp_path / "stage1" / "original_encoder.safetensors").exists() != freeze


def test_a_stage_1_from_scratch_forgets_the_encoder_of_another(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "stage1" / "original_encoder.safetensors"
    run(1, "stage1.freeze_encoder=false")
    assert file.exists()
    for results in ("model", "stage1/model", "stage1/step-1"):  # which refuse other settings
        shutil.rmtree(tmp_path / results)
    _, encoder = run(1, "seed=1")
    assert not file.exists()
    teacher, _ = run(2, "seed=1")
    assert equal(teacher, encoder)


@pytest.mark.parametrize("tap", FEATURE_TAPS)
@pytest.mark.parametrize("encoder", ["siglip", "internvit"])
def test_teacher_and_student_read_one_tap(
    encoder: str, tap: str, make_tokenizer: Callable[..., VQRAEModel]
) -> None:
    model = make_tokenizer(encoder, feature_tap=tap).train()
    teacher = build_teacher(model.encoder, Path("nowhere"), bf16=False)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.rand(2, 3, model.config.image_size, model.config.image_size)
    target = encoder_features(teacher, model.normalize(images), tap)
    assert distillation_loss(model(images).features, target) == 0
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.5)
    features = model(images).features
    expected = (features - target).square().sum() / target.numel()  # VQRAE Eq. 5, as a mean
    torch.testing.assert_close(distillation_loss(features, target), expected)
    assert expected > 0


@torch.no_grad()
def test_a_teacher_of_half_the_size_has_the_same_features(tokenizer: VQRAEModel) -> None:
    size = tokenizer.config.image_size
    pixel_values = torch.randn(2, 3, size, size)
    encoders = (tokenizer.encoder, build_teacher(tokenizer.encoder, Path("nowhere"), bf16=True))
    with torch.autocast("cpu", torch.bfloat16):
        features = [
            encoder_features(encoder, pixel_values, "hidden_states[-1]") for encoder in encoders
        ]
    assert torch.equal(*features)
    large, small = (encoder.get_memory_footprint() for encoder in encoders)
    assert small < 0.65 * large
