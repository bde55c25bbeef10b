"""Whole trainings of a UniTok: captions, its discriminator, resume, processes, refusals."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizer_trainings as trainings
import torch
from PIL import Image
from tokenizer_trainings import DINOV2, UNITOK, metrics, train, weights
from torch import nn
from transformers import AutoModel, AutoTokenizer, Dinov2Config

from vqrae.common.config import ConfigError
from vqrae.tokenizer.losses import adaptive_weight
from vqrae.tokenizer.modeling import VQRAEModel


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    AutoModel.from_config(Dinov2Config(**DINOV2)).save_pretrained(folder)
    return f"stage1.discriminator_backbone={folder}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, backbone: str) -> Path:
    """A training of four steps; not to be changed."""
    output = tmp_path_factory.mktemp("unitok")
    train(output, backbone, system=UNITOK)
    return output


def test_one_stage_trains_every_term(trained: Path) -> None:
    first, *_, last = metrics(trained, 1)
    assert {name for name in last if name.endswith("_loss")} == {
        "reconstruction_loss",
        "l1_loss",
        "codebook_loss",
        "commitment_loss",
        "contrastive_loss",
        "adversarial_loss",
        "discriminator_loss",
        "consistency_loss",
    }
    assert "adversarial_factor" not in first  # nothing of the discriminator before its start
    assert first["contrastive_loss"] == pytest.approx(math.log(4), abs=0.5)  # of 4 in a micro-batch
    assert not (trained / "stage2").exists()
    assert not (trained / "stage1" / "original_encoder.safetensors").exists()
    before, after = (weights(trained / folder) for folder in ("stage1/step-2/model", "model"))
    kept = {key.split(".")[0] for key in before if torch.equal(before[key], after[key])}
    assert kept <= {"feature_mean", "feature_std", "text_model", "quantizer"}


def test_its_folder_reads_texts(trained: Path) -> None:
    text_tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    model = VQRAEModel.from_pretrained(trained / "model")
    texts = ["a red circle", "a red circle left of a blue square"]
    tokens = text_tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert text_tokenizer.unk_token_id not in tokens["input_ids"]
    with torch.no_grad():
        both = model.text_embeddings(**tokens)
        alone = model.text_embeddings(**text_tokenizer(texts[:1], return_tensors="pt"))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0)
    assert (
        text_tokenizer("red " * 99, truncation=True)["input_ids"][-1] == text_tokenizer.eos_token_id
    )


def test_the_logit_scale_stays_below_100(backbone: str, tmp_path: Path) -> None:
    train(tmp_path, backbone, "stage1.text_lr=1e3", "stage1.max_steps=2", system=UNITOK)
    scales = [row["logit_scale"] for row in metrics(tmp_path, 1)]
    assert all(scale in (pytest.approx(1), pytest.approx(100)) for scale in scales)


def test_resume_equals_uninterrupted(trained: Path, backbone: str, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(trained, resumed)  # as a crash after step 2 leaves it
    for folder in ("model", "stage1/model"):
        shutil.rmtree(resumed / folder)
    found = train(resumed, backbone, system=UNITOK)
    assert trainings.equal(found, weights(trained / "model"))
    assert metrics(resumed, 1) == metrics(trained, 1)


@pytest.fixture(scope="module")
def uncaptioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncaptioned")
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_two_processes_train_like_one(uncaptioned: Path, backbone: str, tmp_path: Path) -> None:
    """Also with images that have no caption, and under ZeRO; one micro-batch of pairs in each."""
    data = f"data.train=scenes*0.7+{uncaptioned}*0.3"
    arguments = [backbone, data, "stage1.max_steps=3", "stage1.micro_batch_size=8"]
    launch = {"system": UNITOK}
    expected = trainings.launch(tmp_path / "one", *arguments, count=1, **launch)
    for zero in (0, 2):
        output = tmp_path / str(zero)
        found = trainings.launch(output, *arguments, f"zero={zero}", **launch)
        for one, two in zip(metrics(tmp_path / "one", 1), metrics(output, 1), strict=True):
            assert two == pytest.approx(one, rel=1e-3)
        assert trainings.distance(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stage=2"], "this training has one stage: set stage=1"),
        (["stage1.contrastive_weight=0"], r"set contrastive_weight=0 and model\.text_config="),
        (["model.text_config.vocab_size=9", "model.text_tokenizer=TEXT"], "at least the 83 ids of"),
        (["data.train=FOLDER"], "has no captions, expected some for contrastive_weight"),
    ],
)
def test_mistakes_are_named(
    options: list[str], message: str, trained: Path, uncaptioned: Path, tmp_path: Path
) -> None:
    places = {"TEXT": str(trained / "model"), "FOLDER": str(uncaptioned)}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    with pytest.raises((ConfigError, ValueError), match=message) as error:
        train(tmp_path, *options, system=UNITOK)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*/*"))


# ---- the published objective


def test_the_published_objective() -> None:
    config = trainings.read("unitok")
    stage, steps = config.stage1, config.stage1.max_steps
    assert (config.stages, config.data.crop, config.data.random_flip) == ((1,), "resized", False)
    # Pixels in [-1, 1] give 4 times the squared and twice the absolute error of those in [0, 1].
    assert (stage.reconstruction_weight / 4, stage.l1_weight / 2) == (1.0, 0.2)
    assert (stage.perceptual_network, stage.perceptual_weight) == ("lpips", 1.0)
    assert (stage.codebook_weight, stage.commitment_weight) == (1.0, 0.25)
    assert (stage.contrastive_weight, config.model.contrastive) == (1.0, "softmax")
    assert (stage.adversarial_weight, stage.adaptive_weight) == (0.4, (0.015, 1e4))
    assert (stage.discriminator_weight, stage.consistency_weight, stage.lecam_weight) == (2, 4, 0)
    assert (stage.adam_betas, stage.adam_eps, stage.weight_decay) == ((0.9, 0.95), 1e-6, 0.02)
    assert (stage.discriminator_adam_betas, stage.discriminator_weight_decay) == ((0.5, 0.9), 0.2)
    assert (stage.max_grad_norm, stage.end_lr / stage.decoder_lr) == (10, pytest.approx(0.1))
    assert steps == 1_280_000_000 // stage.global_batch_size
    shares = {
        stage.warmup_steps: 0.01,
        stage.discriminator_start: 0.375,
        stage.discriminator_ramp: 0.03,
        stage.discriminator_warmup_steps: 0.03,
        stage.discriminator_blur_steps: 0.06,
    }
    for count, share in shares.items():
        assert count == pytest.approx(share * steps, abs=1)


def test_the_blur_fades_from_the_start_of_the_discriminator() -> None:
    options = [
        "discriminator_start=10",
        "discriminator_blur_steps=8",
        "discriminator_warmup_steps=4",
    ]
    stage = trainings.read("unitok_tiny", *(f"stage1.{option}" for option in options)).stage1
    assert [stage.blur_at(step) for step in (10, 14, 18, 99)] == [1, 0.5, 0, 0]
    assert stage.discriminator_rate_factor(12) == pytest.approx(3 / 5)
    own = ["discriminator_weight_decay=0.2", "discriminator_adam_betas=[0.5, 0.9]"]
    stage = trainings.read("unitok_tiny", *(f"stage1.{option}" for option in own)).stage1
    optimization = stage.discriminator_optimization
    assert (optimization.weight_decay, optimization.adam_betas) == (0.2, (0.5, 0.9))


def test_the_adaptive_weight_balances_both_losses_at_the_last_layer() -> None:
    torch.manual_seed(0)
    layer, hidden, target = nn.Linear(4, 3), torch.randn(5, 4), torch.randn(5, 3)
    output = layer(hidden)
    image_loss, adversarial_loss = (output - target).square().mean(), -output.sum() * 1e-3
    limits = (0.0, 1e4)
    factor = adaptive_weight(image_loss, adversarial_loss, layer.weight, limits)
    assert not factor.requires_grad
    (pull,) = torch.autograd.grad(image_loss, layer.weight, retain_graph=True)
    (push,) = torch.autograd.grad(adversarial_loss, layer.weight, retain_graph=True)
    torch.testing.assert_close(factor, pull.norm() / (push.norm() + 1e-6))
    for limits in ((1e3, 1e4), (0.0, 0.5)):
        clamped = adaptive_weight(image_loss, adversarial_loss, layer.weight, limits)
        assert clamped == factor.clamp(*limits)
    assert layer.weight.grad is None
