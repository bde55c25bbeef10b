"""What a resume must not depend on: intervals, micro-batch, processes; and what it refuses."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vqrae.common.distributed import require_same_partition
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.stage import StageTrainer

TRAININGS = runpy.run_path(str(Path(__file__).with_name("test_train.py")))
train, launch, metrics, without_speed = (
    TRAININGS[name] for name in ("train", "launch", "metrics", "without_speed")
)


@pytest.mark.slow
def test_awkward_intervals_and_a_resume_on_other_processes_and_micro_batches(
    tmp_path: Path,
) -> None:
    """One process revives at 2 and saves at 3; two go on from there with twice the micro-batches, save at 6 and log at 7."""
    awkward = [
        "stage1.max_steps=7",
        "stage1.revival_interval=2",
        "stage1.revival_until=0.3",
        "save_steps=3",
        "log_steps=7",
    ]
    arguments = [*TRAININGS["TWO_PROCESSES"], "stage=1", "keep_checkpoints=9", *awkward]
    # In a process of its own, as the two are: what other tests leave in this one must not matter.
    job = [sys.executable, "-m", "vqrae.tokenizer.train", *TRAININGS["ARGUMENTS"], *arguments]
    job += [f"output_dir={tmp_path / 'one'}", "micro_batch_size=8"]
    subprocess.run(job, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    expected = VQRAEModel.from_pretrained(tmp_path / "one" / "model").state_dict()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for left in ("model", "model_ema", "stage1/model", "stage1/model_ema", "stage1/step-6"):
        shutil.rmtree(tmp_path / "two" / left)
    launch(tmp_path / "two", *arguments, "micro_batch_size=2")
    rows = [metrics(tmp_path / name, 1) for name in ("one", "two")]
    assert [row["step"] for row in rows[1]] == [7]
    assert rows[1][0]["revived_codes"] > 0  # which happened before the resume
    assert without_speed(rows[1][0]) == pytest.approx(without_speed(rows[0][0]), rel=1e-3)
    found = VQRAEModel.from_pretrained(tmp_path / "two" / "model").state_dict()
    distance = sum((found[key] - value).square().sum() for key, value in expected.items()).sqrt()
    assert distance < 1e-4 * sum(value.square().sum() for value in expected.values()).sqrt()


@pytest.mark.slow
def test_zero_adds_up_in_fp32_what_is_computed_in_fp32(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += [
        str(Path(__file__).with_name("reduce_in_zero.py")),
        str(tmp_path / "distances.json"),
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    distances = json.loads((tmp_path / "distances.json").read_text())
    full = (
        "tokenizer.in_proj",
        "tokenizer.quantizer.projection",
        "tokenizer.out_proj",
        "discriminator.",
    )
    assert sum(name.startswith(full) for name in distances) == 16
    for name, distance in distances.items():
        assert distance < (1e-6 if name.startswith(full) else 1e-2), name
    assert (
        distances["tokenizer.decoder.head.weight"] > 1e-4
    )  # what autocast computes in bf16 is added up in bf16


SHORT = ["stage=1", "stage1.max_steps=3", "stage1.revival_interval=0"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed behind its checkpoint of step 2."""
    output = tmp_path_factory.mktemp("run")
    train(output, *SHORT)
    for folder in ("model", "model_ema", "stage1/model", "stage1/model_ema"):
        shutil.rmtree(output / folder)
    return output


def test_counters_are_loaded_onto_the_device_of_the_process(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    load, places = torch.load, {}

    def spy(file: Any, *args: Any, **options: Any) -> Any:
        places[Path(getattr(file, "name", file)).name] = options.get("map_location")
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", spy)
    train(tmp_path / "run", *SHORT)
    assert (
        str(places["counters.pt"]) == "cpu"
    )  # else CUDA tensors would all go to where they were saved


def test_zero_goes_on_with_the_processes_that_it_was_saved_from(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    file = tmp_path / "run" / "stage1" / "step-2" / "train_state" / "state.json"
    state = json.loads(file.read_text())
    assert state == {"step": 2, "zero": 0, "processes": 1}
    file.write_text(json.dumps({**state, "zero": 2, "processes": 4}))
    with pytest.raises(
        ValueError,
        match=r"step-2/train_state was written with zero=2, got zero=0: set zero=2 to continue",
    ):
        train(tmp_path / "run", *SHORT)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"in 4 parts.*got 8 processes: launch 4"):
        require_same_partition(tmp_path, {"zero": 2, "processes": 4}, zero=2)
    require_same_partition(tmp_path, {"zero": 0, "processes": 4}, zero=0)
    require_same_partition(tmp_path, {}, zero=2)  # of an older version, which did not say


def test_a_checkpoint_comes_before_the_previews_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: StageTrainer, done: int) -> None:
        raise OSError("no space left for an image")

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "save_previews", fail)
        with pytest.raises(OSError, match="no space left"):
            train(tmp_path, *SHORT, "sample_steps=2")
    assert (tmp_path / "stage1" / "step-2").is_dir()
    train(tmp_path, *SHORT, "sample_steps=2")


# ---- finished runs


def test_a_finished_run_refuses_other_settings_and_keeps_what_it_says(tmp_path: Path) -> None:
    train(tmp_path, *SHORT)
    kept = [(tmp_path / name).read_bytes() for name in ("config.yaml", "manifest.json")]
    for change, named in (
        ("data.train=emoji", r"data\.train 'scenes' -> 'emoji'"),
        ("stage1.decoder_lr=1e-5", r"stage1\.decoder_lr"),
        (
            "stage1.max_steps=9",
            r"finished after 3 steps, got stage1\.max_steps=9: set stage1\.max_steps=3",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            train(tmp_path, *SHORT, change)
        assert [(tmp_path / name).read_bytes() for name in ("config.yaml", "manifest.json")] == kept


# ---- trainings that diverge


def test_a_discriminator_without_finite_gradients_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = StageTrainer.discriminator_step

    def step_badly(
        self: StageTrainer, images: torch.Tensor, reconstruction: torch.Tensor
    ) -> torch.Tensor:
        return step(self, images, reconstruction * float("inf"))

    monkeypatch.setattr(StageTrainer, "discriminator_step", step_badly)
    adversarial = [
        "stage1.adversarial_weight=0.1",
        "stage1.discriminator_lr=1e-3",
        "stage1.discriminator_start=1",
    ]
    arguments = [
        *SHORT,
        *adversarial,
        "stage1.discriminator_channels=[8, 16, 16]",
        "max_nonfinite_steps=2",
    ]
    with pytest.raises(
        FloatingPointError,
        match="no finite gradient of the discriminator, and there is no checkpoint",
    ):
        train(tmp_path, *arguments)
    assert not list(tmp_path.glob("stage1/step-*"))


def test_a_run_whose_last_steps_failed_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer_step = StageTrainer.tokenizer_step

    def step_badly(
        self: StageTrainer, inputs: torch.Tensor, targets: torch.Tensor, step: int
    ) -> Any:
        return tokenizer_step(self, inputs * float("nan"), targets, step)

    monkeypatch.setattr(StageTrainer, "tokenizer_step", step_badly)
    with pytest.raises(
        FloatingPointError, match=r"last 3 steps up to 3 of stage 1.*another output_dir"
    ):
        train(tmp_path, *SHORT)  # fewer than max_nonfinite_steps, but all there are
    assert not (tmp_path / "stage1" / "model").exists()


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = StageTrainer.train_step

    def spoil(self: StageTrainer, step: int, batches: Any) -> None:
        train_step(self, step, batches)
        self.model.quantizer.projection.bias.data[0] = float("inf")

    monkeypatch.setattr(StageTrainer, "train_step", spoil)
    with pytest.raises(
        ValueError, match=r"stage 1: quantizer\.projection\.bias holds values that are not finite"
    ):
        train(tmp_path, *SHORT, "max_nonfinite_steps=99")
    assert not list(tmp_path.glob("stage1/*/config.json"))
