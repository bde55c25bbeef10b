"""Whole trainings of a tiny tokenizer: both stages, resume, several processes, DeepSpeed."""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vqrae.common.config import ConfigError
from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import ModelConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.quantizers.registry import QUANTIZERS
from vqrae.tokenizer.stage import StageTrainer

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
    "ema_decay=0.5",
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
    return [
        json.loads(line)
        for line in (output / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
    ]


def without_speed(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "images_per_second"}


def test_both_stages_leave_a_run_directory(finished: tuple[Path, dict]) -> None:
    output, _ = finished
    assert [row["step"] for row in metrics(output, 1)] == [1, 2, 3, 4]
    assert "discriminator_loss" not in metrics(output, 2)[0]  # not run before its start step
    last = metrics(output, 2)[-1]
    for name in (
        "reconstruction",
        "codebook",
        "commitment",
        "perceptual",
        "distillation",
        "adversarial",
        "discriminator",
    ):
        assert name + "_loss" in last
    assert (output / "stage2" / "samples" / "step-4.png").exists()
    assert (output / "config.yaml").exists()
    assert (output / "manifest.json").exists()
    assert [p.name for p in (output / "stage2").glob("step-*")] == ["step-2"]
    average = VQRAEModel.from_pretrained(output / "model_ema")
    assert (average.config.ema_decay, average.config.ema_updates) == (
        0.5,
        3,
    )  # not during the step that bypasses the quantizer


def test_stage_1_keeps_the_encoder_and_stage_2_tunes_it(finished: tuple[Path, dict]) -> None:
    output, final = finished
    start = build_tokenizer(
        ModelConfig(encoder=None, encoder_config={"model_type": "siglip_vision_model"}), "eager"
    )
    assert start.config.feature_dim == 768  # a bare configuration is the class's own default
    first = VQRAEModel.from_pretrained(output / "stage1" / "step-2" / "model").state_dict()
    second = VQRAEModel.from_pretrained(output / "stage1" / "model").state_dict()
    encoder = [key for key in first if key.startswith("encoder.")]
    assert all(torch.equal(first[key], second[key]) for key in encoder)
    assert not torch.equal(first["decoder.head.weight"], second["decoder.head.weight"])
    assert not torch.equal(
        second["encoder.encoder.layers.0.mlp.fc1.weight"],
        final["encoder.encoder.layers.0.mlp.fc1.weight"],
    )
    # What lies behind the feature tap has no part in anything.
    assert torch.equal(
        second["encoder.post_layernorm.weight"], final["encoder.post_layernorm.weight"]
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_equals_uninterrupted(
    finished: tuple[Path, dict], stage: int, tmp_path: Path
) -> None:
    output, expected = finished
    resumed = tmp_path / "run"
    shutil.copytree(output, resumed)  # as a crash behind step 2 of this stage leaves it
    for folder in (resumed, resumed / f"stage{stage}"):
        for name in ("model", "model_ema"):
            shutil.rmtree(folder / name)
    if stage == 1:
        shutil.rmtree(resumed / "stage2")
    found = train(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    averages = [VQRAEModel.from_pretrained(run / "model_ema") for run in (output, resumed)]
    assert averages[0].config.ema_updates == averages[1].config.ema_updates
    assert all(map(torch.equal, *(average.state_dict().values() for average in averages)))
    for before, after in zip(metrics(output, stage), metrics(resumed, stage), strict=True):
        assert without_speed(before) == without_speed(after)  # losses, norms, rates, usage


def test_a_stopped_run_keeps_its_last_step(
    finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = finished
    original = StageTrainer.train_step

    def train_step(self: StageTrainer, step: int, batches: Any) -> None:
        original(self, step, batches)
        if self.number == 2 and step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "train_step", train_step)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "stage2" / "step-3").is_dir()  # save_steps is 2
    assert all(torch.equal(weight, expected[name]) for name, weight in train(tmp_path).items())


@pytest.mark.parametrize(
    "option",
    ["stage1.decoder_lr=-1e-3", "stage2.global_batch_size=0", "save_steps=0", "data.cutmix=2"],
)
def test_numbers_that_cannot_be_meant_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{option.rpartition('.')[2].partition('=')[0]}: got"):
        train(tmp_path, option)


def test_a_finished_run_is_left_alone(
    finished: tuple[Path, dict], capsys: pytest.CaptureFixture[str]
) -> None:
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
    "l2_vq": (["stage2.codebook_metric=features"], {"codebook_loss"}),
    "ibq": (
        [
            "stage1.entropy_weight=0.05",
            "stage2.entropy_weight=0.05",
            "stage2.codebook_metric=features",
        ],
        {"codebook_loss", "index_loss", "entropy_loss"},
    ),
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
        ValueError,
        match=r"set stage1\.revival_interval=0 .*stage2\.bypass_steps=0 model\.codebook_init=random",
    ):
        train(tmp_path / "fsq", *fsq)
    with pytest.raises(ValueError, match=r"set stage2\.codebook_metric=features"):
        train(tmp_path / "sphere", "model.quantizer=l2_vq")
    with pytest.raises(ValueError, match=r"set stage2\.entropy_weight=0"):
        train(tmp_path / "entropy", "stage2.entropy_weight=0.1")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"stage1\.max_step: unknown key\. Did you mean 'max_steps'"
    ):
        train(tmp_path, "stage1.max_step=3")
    with pytest.raises(FileNotFoundError, match="run stage=1 first"):
        train(tmp_path / "none", "stage=2")
    with pytest.raises(ValueError, match="set micro_batch_size to"):
        train(tmp_path / "batch", "stage1.micro_batch_size=3")


# ---- steps without a finite gradient

BAD_STEP = runpy.run_path(str(Path(__file__).with_name("train_with_a_bad_step.py")))


def test_a_bad_step_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StageTrainer, "tokenizer_step", BAD_STEP["step_badly"])
    train(tmp_path, "save_steps=3", "stage2.max_steps=5", "keep_checkpoints=3")
    rows = metrics(tmp_path, 2)
    assert ["skipped_steps" in row for row in rows] == [False, False, True, True, True]
    assert rows[-1]["skipped_steps"] == rows[-1]["discriminator_skipped_steps"] == 1
    assert math.isnan(rows[2]["reconstruction_loss"])
    assert all(math.isfinite(value) for value in rows[-1].values())
    assert not (tmp_path / "stage2" / "step-3").exists()  # nothing is kept while steps are left out


def test_too_many_bad_steps_return_to_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_steps, tokenizer_step = {2, 3}, StageTrainer.tokenizer_step

    def step_badly(
        self: StageTrainer, inputs: torch.Tensor, targets: torch.Tensor, step: int
    ) -> Any:
        return tokenizer_step(
            self, inputs * (float("nan") if step in bad_steps else 1), targets, step
        )

    monkeypatch.setattr(StageTrainer, "tokenizer_step", step_badly)
    arguments = [
        "max_nonfinite_steps=2",
        "stage=1",
        "stage1.max_steps=6",
        "stage1.revival_interval=0",
    ]
    final = train(tmp_path / "helps", *arguments)
    assert "tokenizer without finite gradients at step 4" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in final.values())
    assert metrics(tmp_path / "helps", 1)[-1]["skipped_steps"] == 2
    with pytest.raises(FloatingPointError, match="there is no checkpoint"):
        train(tmp_path / "early", *arguments, "save_steps=100")
    bad_steps |= {4, 5}
    with pytest.raises(FloatingPointError, match=r"going back to .*step-2 did not help"):
        train(tmp_path / "hopeless", *arguments)


# ---- several processes

TWO_PROCESSES = [
    "bf16=false",
    "stage1.optimizer=adamw",  # Muon gives the smallest directions of a gradient, which are rounding, full weight
    "stage2.optimizer=adamw",
    "data.random_flip=true",
    "data.cutmix=0.7",
    "stage1.max_steps=2",
    "stage2.max_steps=5",
    "stage1.revival_interval=0",
    "stage2.revival_interval=0",
    "stage2.bypass_steps=0",
]


def launch(output: Path, *more: str, processes: int = 2) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    command += [
        str(Path(__file__).with_name("train_with_a_bad_step.py")),
        *ARGUMENTS,
        f"output_dir={output}",
        *more,
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A process of its own as well, for settings that other tests leave behind would change its rounding."""
    output = tmp_path_factory.mktemp("one")
    launch(output, *TWO_PROCESSES, processes=1)
    return output, VQRAEModel.from_pretrained(output / "model").state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_two_processes_train_like_one(
    zero: int, one_process: tuple[Path, dict], tmp_path: Path
) -> None:
    """Both networks, under DDP and ZeRO, with a step that is left out: every figure of every step, then the weights."""
    output, expected = one_process
    launch(tmp_path, *TWO_PROCESSES, f"zero={zero}")
    for stage in (1, 2):
        for one, two in zip(metrics(output, stage), metrics(tmp_path, stage), strict=True):
            assert without_speed(two) == pytest.approx(without_speed(one), rel=1e-3, nan_ok=True)
    assert metrics(tmp_path, 2)[-1]["discriminator_skipped_steps"] == 1
    found = VQRAEModel.from_pretrained(tmp_path / "model").state_dict()
    distance = sum((found[key] - value).square().sum() for key, value in expected.items()).sqrt()
    assert distance < 1e-4 * sum(value.square().sum() for value in expected.values()).sqrt()


@pytest.mark.slow
def test_zero_keeps_the_code_space_that_is_made_behind_the_bypass(tmp_path: Path) -> None:
    """ZeRO trains copies of the weights; without a word to it, its next step would bring the old projections back."""
    still = [
        f"stage{n}.{rate}=1e-12" for n in (1, 2) for rate in ("decoder_lr", "end_lr", "encoder_lr")
    ]
    arguments = [
        "stage1.max_steps=1",
        "stage2.max_steps=2",
        "stage2.bypass_steps=1",
        "stage2.codebook_metric=pixels",
    ]
    launch(tmp_path, *TWO_PROCESSES, *still, *arguments, "zero=1", processes=1)
    before, after = (
        VQRAEModel.from_pretrained(tmp_path / folder) for folder in ("stage1/model", "model")
    )
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reconstructions = [model(images, bypass=True).reconstruction for model in (before, after)]
    torch.testing.assert_close(*reconstructions, atol=1e-4, rtol=0)
    assert (
        before.in_proj.weight - after.in_proj.weight
    ).norm() > 0.1 * before.in_proj.weight.norm()
