"""A run directory belongs to one process and to the settings that its contents were made with."""

import dataclasses
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import locked

from vqrae.common import run as runs
from vqrae.common.files import read_json
from vqrae.common.run import (
    changed_settings,
    hold,
    kept,
    read_metrics,
)


@dataclass(frozen=True, kw_only=True)
class Steps:
    max_steps: int = 4
    learning_rate: float = 1e-3
    micro_batch_size: int = 2
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settings:
    output_dir: str = "here"
    data: str = "scenes"
    betas: tuple[float, float] = (0.9, 0.999)
    steps: Steps = field(default_factory=Steps)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has a checkpoint."""
    runs.open(tmp_path, Settings()).begin({"data": "a"})
    (tmp_path / "checkpoint-2").mkdir()
    return tmp_path


def test_other_settings_are_refused_by_name_and_nothing_is_written(run: Path) -> None:
    before = {file.name: file.read_bytes() for file in run.glob("*.*") if file.is_file()}
    other = Settings(data="mine.json", steps=Steps(learning_rate=1e-4, extra={"adafactor": True}))
    with pytest.raises(ValueError, match="differ") as error:
        runs.open(run, other)
    for change in (
        "data 'scenes' -> 'mine.json'",
        "steps.learning_rate 0.001 -> 0.0001",
        "steps.extra.adafactor None -> True",
    ):
        assert change in str(error.value)
    with pytest.raises(ValueError, match="max_steps 4 -> 2"):
        runs.open(run, Settings(steps=Steps(max_steps=2)))
    with pytest.raises(ValueError, match="data 'a' -> 'b'"):
        runs.open(run, Settings()).begin({"data": "b"})
    assert before == {file.name: file.read_bytes() for file in run.glob("*.*") if file.is_file()}


def test_more_steps_and_another_machine_are_no_other_settings(run: Path) -> None:
    grown = Settings(
        output_dir="elsewhere",
        steps=Steps(max_steps=8, micro_batch_size=1, extra={"gradient_checkpointing": True}),
    )
    runs.open(run, grown).begin({"data": "a", "new": "c"})
    assert "max_steps: 8" in (run / "config.yaml").read_text()
    assert not changed_settings(run, grown)
    assert not changed_settings(run, dataclasses.replace(grown, data="other"), ignore={"data"})


def test_the_manifest_keeps_every_launch(run: Path) -> None:
    first = read_json(run / "manifest.json")
    for _ in range(2):
        runs.open(run, Settings()).begin({"data": "a"})
    manifest = read_json(run / "manifest.json")
    assert {key: manifest[key] for key in first} == first
    assert [set(launch) for launch in manifest["resumed"]] == [
        {"command", "git_commit", "packages", "started"}
    ] * 2


def test_a_run_without_results_may_begin_with_other_settings(tmp_path: Path) -> None:
    runs.open(tmp_path, Settings(data="tpyo")).begin({"data": "a"})
    runs.open(tmp_path, Settings(data="typo")).begin({"data": "b"})
    assert "data: typo" in (tmp_path / "config.yaml").read_text()
    assert "resumed" not in read_json(tmp_path / "manifest.json")


def test_what_killed_processes_left_is_removed(run: Path) -> None:
    (run / ".model.123@00000000.tmp").mkdir()
    (run / ".model.123@00000000.tmp" / "model.safetensors").touch()
    (run / ".config.yaml.9@00000000.tmp").touch()
    (run / "samples").mkdir()
    (run / "samples" / ".step-2.png.9@00000000.tmp").touch()
    runs.open(run, Settings()).begin()
    assert [path.name for path in run.rglob(".*")] == [".lock"]


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file) as said, pytest.raises(ValueError, match=f"{tmp_path} {said}"):
        runs.open(tmp_path)
    runs.open(tmp_path)
    assert file.read_text() == f"process {os.getpid()} on {platform.node()}\n"
    hold(file, "again, in the same process")


def test_a_value_is_kept_for_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "score.json"
    values = [kept(file, {"shape": (1, 2), "seed": 0}, lambda: {"score": 1}) for _ in range(2)]
    assert values[0] == values[1] == {"score": 1, "settings": {"shape": [1, 2], "seed": 0}}
    with pytest.raises(ValueError, match="other settings \\(seed 0 -> 1\\)"):
        kept(file, {"shape": (1, 2), "seed": 1}, lambda: {"score": 2})
    assert read_json(file) == values[0]


def test_metrics_survive_a_crash_and_a_rewind(tmp_path: Path) -> None:
    run = runs.open(tmp_path)
    run.begin()
    for step in (1, 2, 3):
        run.log(step, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    run.rewind(2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert {"command", "git_commit", "packages", "seed"} <= set(
        read_json(tmp_path / "manifest.json")
    )
