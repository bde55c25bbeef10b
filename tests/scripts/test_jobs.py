"""Every job on the `Trainer`: one GPU a process, whole checkpoints, no diverged models."""

import importlib
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from vqrae.common import distributed
from vqrae.common import trainer as common_trainer
from vqrae.common.cli import parse
from vqrae.common.errors import exit_code
from vqrae.common.run import read_metrics, trained_steps
from vqrae.generation.extract_codes import main as extract_codes
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm
from vqrae.scripts.check_kill import all_jobs

# Job: prefix of its optimization, folder of its checkpoints, further arguments.
TRAINER_JOBS: dict[str, tuple[str, str, list[str]]] = {
    "encoder": ("optimization", "checkpoints", []),
    "llm": ("optimization", ".", []),
    "llava": ("sft", "sft", ["stage=sft"]),
    "generator": ("optimization", ".", []),
}


@pytest.fixture(scope="session")
def parts(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny models that the jobs start from."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "tokenizer").symlink_to(tokenizer_folder.parent)
    arguments = all_jobs(folder)["llm"].arguments
    model, text_tokenizer = build_tiny_llm(
        parse(TinyLLMConfig, arguments, package="vqrae.quickstart")
    )
    model.save_pretrained(folder / "llm")
    text_tokenizer.save_pretrained(folder / "llm")
    extract_codes(
        ["tiny", f"tokenizer={folder / 'tokenizer'}", "size=8", f"output_dir={folder / 'codes'}"]
    )
    return folder


class Runner:
    """Runs a job in this process, in one folder."""

    def __init__(self, name: str, parts: Path, output: Path) -> None:
        self.prefix, checkpoints, more = TRAINER_JOBS[name]
        job = all_jobs(parts)[name]
        self.output, self.checkpoints = output, output / checkpoints
        self.arguments = [
            argument.replace("OUTPUT", str(output)) for argument in [*job.arguments, *more]
        ]
        self.main: Any = importlib.import_module(job.module).main

    def __call__(self, **options: Any) -> None:
        self.main(
            [*self.arguments, *(f"{self.prefix}.{key}={value}" for key, value in options.items())]
        )

    def kept(self) -> set[str]:
        return {path.name for path in self.checkpoints.glob("*checkpoint*")}

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model" / "model.safetensors")


@pytest.fixture(params=list(TRAINER_JOBS))
def run(request: pytest.FixtureRequest, parts: Path, tmp_path: Path) -> Runner:
    return Runner(request.param, parts, tmp_path / "run")


@pytest.fixture
def llm(parts: Path, tmp_path: Path) -> Runner:
    return Runner("llm", parts, tmp_path / "run")


def stop_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal come in the middle of a step."""
    original, sent = Trainer.training_step, list[int]()

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step - 1 and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


def test_a_signal_costs_no_step_and_one_process_uses_one_gpu_of_eight(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, int]] = []

    def arguments_of_a_gpu_machine(**options: Any) -> TrainingArguments:
        return TrainingArguments(**{**options, "use_cpu": False})

    def wrap(self: Trainer, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        used.append((self.args.n_gpu, self.args.train_batch_size))
        return original(self, model, *args, **kwargs)

    original = Trainer._wrap_model
    monkeypatch.setattr(Trainer, "_wrap_model", wrap)
    with monkeypatch.context() as machine:
        machine.setattr(torch.cuda, "device_count", lambda: 8)
        machine.setattr(torch.cuda, "is_available", lambda: False)  # else models would move there
        machine.setattr(common_trainer, "TrainingArguments", arguments_of_a_gpu_machine)
        stop_at(2, signal.SIGTERM, machine)
        with pytest.raises(SystemExit) as stopped:
            run(save_steps=100, bf16=False)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert used
    assert set(used) == {(1, 1)}
    assert run.kept() == {"checkpoint-2"}
    assert trained_steps(run.output / "model") == 0
    run(bf16=False)
    assert run.kept() == {"checkpoint-3"}
    assert trained_steps(run.output / "model") == 3
    assert not [path for path in run.output.rglob(".*") if path.name != ".lock"]


def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    llm: Runner, parts: Path, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, signal.SIGINT, patch)
        with pytest.raises(SystemExit) as stopped:
            llm(save_steps=100)
    assert stopped.value.code == 128 + signal.SIGINT
    llm(save_steps=100)
    whole = Runner("llm", parts, tmp_path / "whole")
    whole()
    assert all(torch.equal(llm.weights()[name], weight) for name, weight in whole.weights().items())
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(each.output)] for each in (llm, whole)
    ]
    assert losses[0] == losses[1]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("name", ["llm", "generator", "llava"])
def test_a_prolonged_run_that_dies_while_it_saves_is_not_finished(
    name: str, parts: Path, tmp_path: Path
) -> None:
    run = Runner(name, parts, tmp_path / "run")
    run(max_steps=1)
    short = run.weights()

    def die(*_: Any, **__: Any) -> None:
        raise OSError("no power")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common_trainer, "mark_trained", die)
        with pytest.raises(OSError, match="no power"):
            run(max_steps=2)
    assert trained_steps(run.output / "model") == 1
    run(max_steps=2)
    assert trained_steps(run.output / "model") == 2
    assert any(not torch.equal(short[key], weight) for key, weight in run.weights().items())


def test_a_checkpoint_that_cannot_be_written_is_absent(
    llm: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", die)
        with pytest.raises(OSError, match="no space"):
            llm()
    assert not llm.kept()
    llm()
    assert llm.kept() == {"checkpoint-3"}


def test_diverged_weights_are_not_kept_and_the_advice_works(
    llm: Runner, parts: Path, tmp_path: Path
) -> None:
    rates = {
        "optimizer": "adamw",
        "lr_scheduler_type": "constant_with_warmup",
        "max_grad_norm": 0.0,
        "logging_steps": 50,
    }
    with pytest.raises(FloatingPointError, match="lower learning_rate and another output_dir"):
        llm(learning_rate=1e38, **rates)
    assert not [path for path in llm.checkpoints.glob("checkpoint-*") if has_nan(path)]
    again = Runner("llm", parts, tmp_path / "again")
    again(learning_rate=1e-3, **rates)
    assert trained_steps(again.output / "model") == 3


def has_nan(folder: Path) -> bool:
    return not all(
        weight.isfinite().all() for weight in load_file(folder / "model.safetensors").values()
    )


class Unsendable:
    """Samples that a worker cannot hand over: they are lost as when shared memory is full."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return [threading.Lock()]


def test_workers_that_hand_over_nothing_are_noticed(
    llm: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common_trainer, "STALL_SECONDS", 1)
    monkeypatch.setattr("vqrae.quickstart.train_llm.SceneText", lambda *_, **__: Unsendable())
    monkeypatch.setattr("vqrae.quickstart.train_llm.TextCollator", lambda *_: list)
    assert exit_code(lambda: llm(dataloader_num_workers=1), "vqrae") == 2
    assert "/dev/shm is full" in capsys.readouterr().err
    assert distributed.worker_options(2)["timeout"] == distributed.STALL_SECONDS


def test_the_batch_is_checked_before_anything_is_loaded(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match="cannot be shared evenly by 3 processes: launch 1, 2 processes"
    ):
        run()
    assert not list(run.output.rglob("config.yaml"))
