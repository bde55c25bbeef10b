"""Whole trainings: both stages, resume, refusals, quantizers, bad steps, several processes."""

import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import tokenizer_trainings as trainings
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizer_trainings import SHORT, bad_images, launch, metrics, of_whole_batches, train, weights

from vqrae.common.config import ConfigError
from vqrae.common.files import read_json
from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.data import Batch, StageImages
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.quantizers.registry import QUANTIZERS


def test_both_stages_leave_a_run_directory(finished: Path) -> None:
    assert [row["step"] for row in metrics(finished, 1)] == [1, 2, 3, 4]
    first, *_, last = metrics(finished, 2)
    assert "discriminator_loss" not in first  # not run before its start
    losses = {name.removesuffix("_loss") for name in last if name.endswith("_loss")}
    assert losses == {"reconstruction", "codebook", "commitment"} | {
        *("perceptual", "distillation", "alignment", "adversarial", "discriminator")
    }
    for file in ("stage2/samples/step-4.png", "config.yaml", "manifest.json"):
        assert (finished / file).exists()
    events = EventAccumulator(str(finished / "stage2" / "events")).Reload()
    assert events.Tags()["images"] == ["reconstructions"]
    assert events.Tags()["histograms"] == ["code_use"]
    assert [folder.name for folder in (finished / "stage2").glob("step-*")] == ["step-2"]
    average = VQRAEModel.from_pretrained(finished / "model_ema").config
    # Not updated in the step that bypasses the quantizer.
    assert (average.ema_decay, average.ema_updates) == (0.5, 3)


def test_stage_1_keeps_the_encoder_and_stage_2_tunes_it(finished: Path) -> None:
    folders = ("stage1/step-2/model", "stage1/model", "model")
    middle, first, final = (weights(finished / folder) for folder in folders)
    encoder = [key for key in first if key.startswith("encoder.")]
    assert all(torch.equal(middle[key], first[key]) for key in encoder)
    assert not torch.equal(middle["decoder.head.weight"], first["decoder.head.weight"])
    tuned = [key for key in encoder if not torch.equal(first[key], final[key])]
    # All but the norm that follows the feature tap.
    assert set(encoder) - set(tuned) == {
        "encoder.post_layernorm.weight",
        "encoder.post_layernorm.bias",
    }


def test_a_finished_run_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "stage2" / "model" / "model.safetensors"
    before = file.stat().st_mtime_ns
    train(finished)
    assert "stage 2 is finished" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before


# ---- resume


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_equals_uninterrupted(finished: Path, stage: int, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(finished, resumed)  # as a crash after step 2 of this stage leaves it
    for folder in (resumed, resumed / f"stage{stage}"):
        for name in ("model", "model_ema"):
            shutil.rmtree(folder / name)
    if stage == 1:
        shutil.rmtree(resumed / "stage2")
    assert trainings.equal(train(resumed), weights(finished / "model"))
    before, after = (VQRAEModel.from_pretrained(run / "model_ema") for run in (finished, resumed))
    assert before.config.ema_updates == after.config.ema_updates
    assert trainings.equal(before.state_dict(), after.state_dict())
    assert metrics(finished, stage) == metrics(resumed, stage)


def test_a_stopped_run_keeps_its_last_step(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    micro_batches = StageImages.micro_batches

    def stop_in_stage_2(images: StageImages, start: int) -> Iterator[Batch]:
        for i, batch in enumerate(micro_batches(images, start)):
            if images.seed == 2 and i == 4:  # in the third step
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(StageImages, "micro_batches", stop_in_stage_2)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "stage2" / "step-3").is_dir()  # save_steps is 2
    assert trainings.equal(train(tmp_path), weights(finished / "model"))


def test_a_checkpoint_comes_before_the_previews_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left for an image")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_train, "save_previews", fail)
        with pytest.raises(OSError, match="no space left"):
            train(tmp_path, *SHORT, "sample_steps=2")
    assert (tmp_path / "stage1" / "step-2").is_dir()
    train(tmp_path, *SHORT, "sample_steps=2")


def test_zero_goes_on_with_the_processes_that_it_was_saved_from(tmp_path: Path) -> None:
    train(tmp_path, *SHORT)
    for folder in ("model", "stage1/model"):
        shutil.rmtree(tmp_path / folder)
    file = tmp_path / "stage1" / "step-2" / "train_state" / "state.json"
    state = json.loads(file.read_text())
    assert state == {"step": 2, "zero": 0, "processes": 1}
    file.write_text(json.dumps({**state, "zero": 2, "processes": 4}))
    with pytest.raises(ValueError, match=r"train_state was written with zero=2, got zero=0"):
        train(tmp_path, *SHORT)


# ---- refusals

NO_OPTIONS = "model.quantizer_options={}"
FSQ = ["model.quantizer_options={levels: [8, 8]}", "model.codebook_dim=2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ema_decay=1.0"], r"ema_decay: got 1\.0, expected 0 for none or a number below 1"),
        (["stage1.max_step=3"], r"stage1\.max_step: unknown key\. Did you mean 'max_steps'"),
        (["stage=2"], "run stage=1 first"),
        (["stage1.micro_batch_size=3"], "set micro_batch_size to"),
        (["model.quantizer=l2_vq", NO_OPTIONS], r"set stage2\.codebook_metric=features"),
        (["stage2.entropy_weight=0.1"], r"set stage2\.entropy_weight=0"),
        (
            ["model.quantizer=fsq", *FSQ],
            r"stage1\.revival_interval=0 .*stage2\.bypass_steps=0 model\.codebook_init=random",
        ),
    ],
)
def test_mistakes_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError, FileNotFoundError), match=message):
        train(tmp_path, *options)
    assert not list(tmp_path.glob("*/*"))


def test_a_finished_run_refuses_other_settings_and_keeps_what_it_says(tmp_path: Path) -> None:
    train(tmp_path, *SHORT)
    files = [tmp_path / name for name in ("config.yaml", "manifest.json")]
    recorded = [file.read_bytes() for file in files]
    for change, message in (
        ("data.train=emoji", r"data\.train 'scenes' -> 'emoji'"),
        ("stage1.decoder_lr=1e-5", r"stage1\.decoder_lr"),
        ("stage1.max_steps=9", r"finished after 3 steps, got stage1\.max_steps=9"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, *SHORT, change)
        assert [file.read_bytes() for file in files] == recorded


# ---- quantizers


# Options, and names of losses other than commitment_loss.
EVERY_QUANTIZER: dict[str, tuple[list[str], set[str]]] = {
    "simvq": (["model.quantizer_options={search: bf16, rate_weight: 0.01}"], {"codebook_loss"}),
    "vq": (["model.quantizer_options={search: bf16}"], {"codebook_loss"}),
    "ema_vq": (["model.quantizer_options={decay: 0.9}"], set()),
    "l2_vq": (["stage2.codebook_metric=features"], {"codebook_loss"}),
    "ibq": (
        [*(f"stage{i}.entropy_weight=0.05" for i in (1, 2)), "stage2.codebook_metric=features"],
        {"codebook_loss", "index_loss", "entropy_loss"},
    ),
    "fsq": (
        [*FSQ, "model.codebook_init=random", "stage2.bypass_steps=0"]
        + [f"stage{i}.revival_interval=0" for i in (1, 2)],
        set(),
    ),
    "mcq": (["model.num_codebooks=4", "stage2.codebook_metric=features"], {"codebook_loss"}),
    "rvq": (["model.num_codebooks=2"], {"codebook_loss"}),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_trains_through_both_stages(name: str, tmp_path: Path) -> None:
    options, losses = EVERY_QUANTIZER[name]
    steps = ["stage1.max_steps=2", "stage2.max_steps=2", "stage2.adversarial_weight=0"]
    steps += ["save_steps=9", "ema_decay=0"]
    train(tmp_path, f"model.quantizer={name}", NO_OPTIONS, *steps, *options)
    expected = losses | {"reconstruction_loss"} | ({"commitment_loss"} if name != "fsq" else set())
    row = metrics(tmp_path, 1)[-1]
    assert {key for key in row if key.endswith("_loss")} == expected
    assert ("codebook_usage_min" in row) == (name in ("mcq", "rvq"))
    assert ("code_spread" in row) == (name not in ("mcq", "rvq", "fsq"))
    first, second = (VQRAEModel.from_pretrained(tmp_path / f"stage{n}" / "model") for n in (1, 2))
    moved = not torch.equal(first.code_vectors(), second.code_vectors())
    assert moved == (name != "fsq")


# ---- steps without a finite gradient


def test_a_bad_step_is_left_out_and_counted(tmp_path: Path) -> None:
    with bad_images({2}):
        train(tmp_path, "save_steps=3", "stage2.max_steps=5", "keep_checkpoints=3")
    rows = metrics(tmp_path, 2)
    assert ["skipped_steps" in row for row in rows] == [False, False, True, True, True]
    assert rows[-1]["skipped_steps"] == rows[-1]["discriminator_skipped_steps"] == 1
    assert math.isnan(rows[2]["reconstruction_loss"])
    assert all(math.isfinite(value) for value in rows[-1].values())
    assert not (tmp_path / "stage2" / "step-3").exists()  # nothing is kept after a skipped step


def test_too_many_bad_steps_return_to_the_newest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["max_nonfinite_steps=2", *SHORT, "stage1.max_steps=6"]
    with bad_images({2, 3}):
        final = train(tmp_path / "helps", *arguments)
        assert "no finite gradient of the tokenizer: going on from" in capsys.readouterr().out
        assert all(value.isfinite().all() for value in final.values())
        assert metrics(tmp_path / "helps", 1)[-1]["skipped_steps"] == 2
        with pytest.raises(FloatingPointError, match="there is no checkpoint"):
            train(tmp_path / "early", *arguments, "save_steps=100")
    with (
        bad_images({2, 3, 4, 5}),
        pytest.raises(FloatingPointError, match=r"going back to .*step-2 did not help"),
    ):
        train(tmp_path / "hopeless", *arguments)


def test_a_run_whose_last_steps_failed_is_not_finished(tmp_path: Path) -> None:
    with (
        bad_images({0, 1, 2}),  # fewer than max_nonfinite_steps, but all there are
        pytest.raises(FloatingPointError, match=r"stage 1: the last 3 steps.*another output_dir"),
    ):
        train(tmp_path, *SHORT)
    assert not (tmp_path / "stage1" / "model").exists()


def test_a_discriminator_without_finite_gradients_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = tokenizer_train.discriminator_hinge_loss
    monkeypatch.setattr(
        tokenizer_train, "discriminator_hinge_loss", lambda *logits: loss(*logits) * float("inf")
    )
    adversarial = [option.replace("stage2", "stage1") for option in trainings.ADVERSARIAL]
    with pytest.raises(
        FloatingPointError, match="of the discriminator, and there is no checkpoint"
    ):
        train(tmp_path, *SHORT, *adversarial, "max_nonfinite_steps=2")
    assert not list(tmp_path.glob("stage1/step-*"))


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(average: Any, model: VQRAEModel) -> None:
        model.quantizer.projection.bias.data[0] = float("inf")

    monkeypatch.setattr(tokenizer_train.WeightAverage, "update", spoil)
    with pytest.raises(ValueError, match=r"quantizer\.projection\.bias holds values that are not"):
        train(tmp_path, *SHORT, "max_nonfinite_steps=99")
    assert not list(tmp_path.glob("stage1/*/config.json"))


# ---- several processes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    launch(output, *trainings.ANY_PROCESSES, count=1, bad_step=2)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])  # 1: see the test that follows the bypass
def test_two_processes_train_like_one(zero: int, one_process: Path, tmp_path: Path) -> None:
    """Both networks, with a skipped step: every figure of every step, then the weights."""
    found = launch(tmp_path, *trainings.ANY_PROCESSES, f"zero={zero}", bad_step=2)
    for stage in (1, 2):
        for one, two in zip(metrics(one_process, stage), metrics(tmp_path, stage), strict=True):
            expected = pytest.approx(of_whole_batches(one), rel=1e-3, nan_ok=True)
            assert of_whole_batches(two) == expected
    assert metrics(tmp_path, 2)[-1]["discriminator_skipped_steps"] == 1
    assert trainings.distance(found, weights(one_process / "model")) < 1e-4


@pytest.mark.slow
def test_a_resume_on_other_processes_and_micro_batches(tmp_path: Path) -> None:
    """Codes move after step 2, a checkpoint follows step 3; two processes continue and log at 5."""
    awkward = ["stage1.max_steps=5", "stage1.revival_interval=2", "stage1.revival_until=0.5"]
    arguments = [*trainings.ANY_PROCESSES, "stage=1", *awkward, "save_steps=3", "log_steps=5"]
    one, two = tmp_path / "one", tmp_path / "two"
    expected = launch(one, *arguments, "micro_batch_size=8", count=1)
    shutil.copytree(one, two)
    assert (two / "stage1" / "step-3").is_dir()
    for left in ("model", "model_ema", "stage1/model", "stage1/model_ema"):
        shutil.rmtree(two / left)
    found = launch(two, *arguments, "micro_batch_size=2")
    (row,), (same_row,) = metrics(one, 1), metrics(two, 1)
    assert row["revived_codes"] > 0  # which happened before the resume
    assert of_whole_batches(same_row) == pytest.approx(of_whole_batches(row), rel=1e-3)
    assert trainings.distance(found, expected) < 1e-4


@pytest.mark.slow
def test_zero_keeps_the_code_space_that_follows_the_bypass(tmp_path: Path) -> None:
    """ZeRO trains copies of the weights; unrefreshed, they would bring the old projections back."""
    still = ["max_steps=1", "decoder_lr=1e-12", "end_lr=1e-12", "encoder_lr=1e-12"]
    stages = [f"stage1.{rate}" for rate in still] + [f"stage2.{rate}" for rate in still]
    arguments = [*trainings.ANY_PROCESSES, *stages, "stage2.max_steps=2", "stage2.bypass_steps=1"]
    launch(tmp_path, *arguments, "stage2.codebook_metric=pixels", "zero=1", count=1)
    folders = (tmp_path / "stage1" / "model", tmp_path / "model")
    before, after = map(VQRAEModel.from_pretrained, folders)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reconstructions = [model(images, bypass=True).reconstruction for model in (before, after)]
    torch.testing.assert_close(*reconstructions, atol=1e-4, rtol=0)
    change = (before.in_proj.weight - after.in_proj.weight).norm()
    assert change > 0.1 * before.in_proj.weight.norm()


@pytest.mark.slow
def test_zero_sums_in_fp32_what_is_computed_in_fp32(tmp_path: Path) -> None:
    file, compare = tmp_path / "distances.json", "compare_gradients"
    processes.launch(trainings.__name__, [str(file)], processes=2, function=compare)
    distances = read_json(file)
    full = ("tokenizer.in_proj", "tokenizer.quantizer.projection", "tokenizer.out_proj")
    full = (*full, "discriminator.")
    assert sum(name.startswith(full) for name in distances) == 16
    for name, distance in distances.items():
        assert distance < (1e-6 if name.startswith(full) else 1e-2), name
    # What autocast computes in bf16 is summed in bf16.
    assert distances["tokenizer.decoder.head.weight"] > 1e-4
