"""Whole trainings of a tiny tokenizer: both stages, resume, several processes, DeepSpeed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqrae.common.config import ConfigError
from vqrae.tokenizer import VQRAEModel
from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.quantizers import QUANTIZERS

ENCODER = (
    "{model_type: siglip_vision_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,"
    " image_size: 64, patch_size: 8, vision_use_head: false}"
)
# Everything at once: perceptual loss, distillation, discriminator from the second step on, revival at every step.
ARGUMENTS = [
    "tiny",
    "model.encoder=",
    f"model.encoder_config={ENCODER}",
    "model.codebook_size=64",
    "model.codebook_dim=32",
    "log_steps=1",
    "save_steps=2",
    *(
        f"stage{n}.{pair}"
        for n in (1, 2)
        for pair in ("max_steps=4", "global_batch_size=8", "micro_batch_size=4", "warmup_steps=1")
    ),
    "stage1.revival_interval=1",
    "stage2.revival_interval=1",
    "stage2.bypass_steps=1",
    "stage2.perceptual_weight=0.1",
    "stage2.distillation_weight=1.0",
    "stage2.adversarial_weight=0.1",
    "stage2.discriminator_lr=1e-3",
    "stage2.discriminator_start=1",
    "stage2.discriminator_channels=[8, 16, 16]",
]


def train(output: Path, *more: str) -> dict[str, torch.Tensor]:
    tokenizer_train.main([*ARGUMENTS, f"output_dir={output}", *more])
    return VQRAEModel.from_pretrained(output / "model").state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("run")
    return output, train(output)


def metrics(output: Path, stage: int) -> list[dict]:
    return [json.loads(line) for line in (output / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_leave_a_run_directory(finished: tuple[Path, dict]) -> None:
    output, _ = finished
    assert [row["step"] for row in metrics(output, 1)] == [1, 2, 3, 4]
    assert "discriminator_loss" not in metrics(output, 2)[0]  # not run before its start step
    last = metrics(output, 2)[-1]
    for name in ("reconstruction", "codebook", "commitment", "perceptual", "distillation", "adversarial", "discriminator"):
        assert name + "_loss" in last
    assert (output / "stage2" / "samples" / "step-4.png").exists()
    assert (output / "config.yaml").exists()
    assert (output / "manifest.json").exists()
    assert [p.name for p in (output / "stage2").glob("step-*")] == ["step-2"]


def test_stage_1_keeps_the_encoder_and_stage_2_tunes_it(finished: tuple[Path, dict]) -> None:
    output, final = finished
    start = tokenizer_train.build_tokenizer(
        tokenizer_train.ModelConfig(encoder=None, encoder_config={"model_type": "siglip_vision_model"}), "eager"
    )
    assert start.config.feature_dim == 768  # a bare configuration is the class's own default
    first = VQRAEModel.from_pretrained(output / "stage1" / "step-2" / "model").state_dict()
    second = VQRAEModel.from_pretrained(output / "stage1" / "model").state_dict()
    encoder = [key for key in first if key.startswith("encoder.")]
    assert all(torch.equal(first[key], second[key]) for key in encoder)
    assert not torch.equal(first["decoder.head.weight"], second["decoder.head.weight"])
    assert not torch.equal(second["encoder.encoder.layers.0.mlp.fc1.weight"], final["encoder.encoder.layers.0.mlp.fc1.weight"])
    # What lies behind the feature tap has no part in anything.
    assert torch.equal(second["encoder.post_layernorm.weight"], final["encoder.post_layernorm.weight"])


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_equals_uninterrupted(finished: tuple[Path, dict], stage: int, tmp_path: Path) -> None:
    output, expected = finished
    resumed = tmp_path / "run"
    shutil.copytree(output, resumed)  # as a crash behind step 2 of this stage leaves it
    for later in range(stage, 3):
        shutil.rmtree(resumed / f"stage{later}" / "model")
    if stage == 1:
        shutil.rmtree(resumed / "stage2")
    shutil.rmtree(resumed / "model")
    found = train(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [row["step"] for row in metrics(resumed, stage)] == [1, 2, 3, 4]


def test_a_finished_run_is_left_alone(finished: tuple[Path, dict], capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = finished
    before = (output / "stage2" / "model" / "model.safetensors").stat().st_mtime_ns
    train(output)
    assert "stage 2 is finished" in capsys.readouterr().out
    assert (output / "stage2" / "model" / "model.safetensors").stat().st_mtime_ns == before


# Two steps of both stages with each quantizer: options, and names of its losses beside commitment_loss.
EVERY_QUANTIZER = {
    "simvq": (["model.quantizer_options.search=bf16"], {"codebook_loss"}),
    "vq": (["model.quantizer_options.search=bf16"], {"codebook_loss"}),
    "ema_vq": (["model.quantizer_options.decay=0.9"], set()),
    "l2_vq": ([], {"codebook_loss"}),
    "ibq": (["stage1.entropy_weight=0.05", "stage2.entropy_weight=0.05"], {"codebook_loss", "index_loss", "entropy_loss"}),
    "fsq": (
        [
            "model.quantizer_options.levels=[8, 8]",
            "model.codebook_dim=2",
            "model.codebook_init=random",
            *(f"stage{n}.{key}=0" for n in (1, 2) for key in ("revival_interval", "bypass_steps")),
        ],
        None,
    ),
}


def test_every_quantizer_is_trained_here() -> None:
    assert set(EVERY_QUANTIZER) == set(QUANTIZERS)


@pytest.mark.parametrize("name", EVERY_QUANTIZER)
def test_every_quantizer_trains_through_both_stages(name: str, tmp_path: Path) -> None:
    options, losses = EVERY_QUANTIZER[name]
    steps = ["stage1.max_steps=2", "stage2.max_steps=2", "stage2.adversarial_weight=0"]
    train(tmp_path, f"model.quantizer={name}", *steps, *options)
    expected = set() if losses is None else {"commitment_loss", *losses}
    for stage in (1, 2):
        assert {key for key in metrics(tmp_path, stage)[-1] if key.endswith("_loss")} - {
            "reconstruction_loss",
            "perceptual_loss",
            "distillation_loss",
        } == expected
    first, second = (VQRAEModel.from_pretrained(tmp_path / f"stage{n}" / "model") for n in (1, 2))
    moved = not torch.equal(first.code_vectors(), second.code_vectors())
    assert moved == (name != "fsq")


def test_what_a_quantizer_cannot_do_is_refused_before_training(tmp_path: Path) -> None:
    fsq = ["model.quantizer=fsq", "model.quantizer_options.levels=[8, 8]", "model.codebook_dim=2"]
    with pytest.raises(
        ValueError, match=r"set stage1\.revival_interval=0 .*stage2\.bypass_steps=0 model\.codebook_init=random"
    ):
        train(tmp_path / "fsq", *fsq)
    with pytest.raises(ValueError, match="SimVQ has no entropy_loss"):
        train(tmp_path / "entropy", "stage1.entropy_weight=0.1")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage1\.max_step: unknown key\. Did you mean 'max_steps'"):
        train(tmp_path, "stage1.max_step=3")
    with pytest.raises(FileNotFoundError, match="run stage=1 first"):
        train(tmp_path / "none", "stage=2")
    with pytest.raises(ValueError, match="choose a micro_batch_size"):
        train(tmp_path / "batch", "stage1.micro_batch_size=3")


def launch(output: Path, *more: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "vqrae.tokenizer.train", *ARGUMENTS, f"output_dir={output}", *more]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_two_processes_train_like_one(zero: int, tmp_path: Path) -> None:
    options = [
        "bf16=false",
        f"zero={zero}",
        "stage1.revival_interval=0",
        "stage2.revival_interval=0",
        "stage2.bypass_steps=0",
        "data.random_flip=false",
    ]
    options += ["stage1.max_steps=2", "stage2.max_steps=2"]
    launch(tmp_path / "two", *options)
    one = train(tmp_path / "one", *[option for option in options if "zero" not in option])
    two = VQRAEModel.from_pretrained(tmp_path / "two" / "model").state_dict()
    for stage in (1, 2):  # the gradient over all processes is the gradient of one, not half of it or twice
        first, second = (metrics(tmp_path / run, stage)[0]["grad_norm"] for run in ("one", "two"))
        assert first == pytest.approx(second, rel=0.05)
    # Adam's first steps follow the sign of each gradient, so single weights with a gradient near zero may part.
    distance = sum((two[key] - value).square().sum() for key, value in one.items()).sqrt()
    assert distance < 1e-3 * sum(value.square().sum() for value in one.values()).sqrt()
