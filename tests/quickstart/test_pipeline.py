import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vqrae.common.config import parse_yaml, shipped_config
from vqrae.common.files import read_json
from vqrae.quickstart import pipeline as quickstart
from vqrae.quickstart.systems import SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_step_is_an_entry_point_and_lands_below_the_output(tmp_path: Path, name: str) -> None:
    system = SYSTEMS[name]
    phases = quickstart.pipeline(tmp_path, quickstart.steps_within(12, system), "emoji", system)
    steps = [step for branches in phases for branch in branches for step in branch]
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert callable(importlib.import_module(f"vqrae.{step.module}").main)
        assert any(str(tmp_path) in argument for argument in step.arguments)


@pytest.mark.parametrize(
    ("training", "package", "config", "key"),
    [
        ("encoder", "quickstart", "tiny_encoder", "optimization"),
        ("tokenizer.stage1", "tokenizer", "tiny", "stage1"),
        ("tokenizer.stage2", "tokenizer", "tiny", "stage2"),
        ("llm", "quickstart", "tiny_llm", "optimization"),
        ("understanding.pretrain", "understanding", "tiny", "pretrain"),
        ("understanding.sft", "understanding", "tiny", "sft"),
        ("generation", "generation", "tiny", "training.optimization"),
    ],
)
def test_bare_scripts_train_as_long_as_the_default(
    training: str, package: str, config: str, key: str
) -> None:
    values = parse_yaml(shipped_config(f"vqrae.{package}", config).read_text())
    for part in key.split("."):
        values = values[part]
    assert values["max_steps"] == quickstart.training_steps(SYSTEMS["vqrae"])[training]


def test_minutes_scale_every_training_step_up_to_its_most() -> None:
    default, longer, longest = (quickstart.steps_within(minutes) for minutes in (12, 18, 90))
    assert default == quickstart.training_steps(SYSTEMS["vqrae"])
    for name in default.keys() - {"llm"}:
        assert longer[name] == round(default[name] * 1.5)
    assert longest["generation"] == 7.5 * default["generation"]
    assert longest["encoder"] == 3 * default["encoder"]
    assert longest["llm"] == longer["llm"] == default["llm"]
    assert min(quickstart.steps_within(0.001).values()) >= 4


def test_a_plan_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    broken = {"llm"}

    def pretend(
        step: quickstart.Step, clock: quickstart.Clock, num_threads: int | None = None
    ) -> None:
        ran.append(step.name)
        clock.record(step.name, 1.0, done=step.name not in broken)
        if step.name in broken:
            raise SystemExit(1)

    monkeypatch.setattr(quickstart, "run", pretend)
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(tmp_path)])
    assert ran[:4] == ["encoder", "tokenizer", "eval_reconstruction", "eval_zeroshot"]
    # The other branch came to its end.
    assert sorted(ran[4:]) == ["codes", "eval_generation", "generation", "llm"]
    ran.clear()
    broken.clear()
    quickstart.main(["--output", str(tmp_path)])
    # What was done is not done again.
    assert ran == ["llm", "understanding", "eval_understanding", "report"]
    with pytest.raises(ValueError, match="was started with other options"):
        quickstart.main(["--output", str(tmp_path), "--minutes", "90"])


def test_branches_run_side_by_side_with_half_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, threads = threading.Barrier(2, timeout=30), []

    def meet(step: quickstart.Step, clock: quickstart.Clock, num_threads: int | None) -> None:
        meeting.wait()  # passes only when both branches are here
        threads.append(num_threads)

    monkeypatch.setattr(quickstart, "run", meet)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    branches = [[quickstart.Step(name, "module", [], 1)] for name in ("llm", "codes")]
    quickstart.run_phase(branches, quickstart.Clock(tmp_path))
    assert threads == [2, 2]


@pytest.mark.skipif(
    not quickstart.die_with_parent(), reason="this system cannot tie a process to another"
)
def test_a_killed_quickstart_takes_its_steps_along(tmp_path: Path) -> None:
    command = [*quickstart.die_with_parent(), sys.executable, "-c", "import time; time.sleep(60)"]
    start = f"import subprocess, time; print(subprocess.Popen({command}).pid, flush=True)"
    start += "; time.sleep(60)"
    killed = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    step = Path("/proc") / killed.stdout.readline().strip() / "cmdline"
    # Nothing yet, or setpriv: not tied.
    while not step.read_bytes().startswith(sys.executable.encode()):
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 10
    while step.exists() and step.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    # Gone, or waiting to be collected.
    assert not step.exists() or not step.read_bytes()


def test_a_step_that_outlives_its_quickstart_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quickstart.exclusive_lock(tmp_path):
        orphan = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(1)"], close_fds=False
        )
    with quickstart.exclusive_lock(tmp_path):
        assert orphan.poll() is not None or orphan.wait(timeout=1) == 0
    assert "waiting for the processes of another run" in capsys.readouterr().out


def test_what_ends_the_quickstart_ends_its_steps(tmp_path: Path) -> None:
    step = tmp_path / "step"
    step.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/$3\nexec sleep 60\n")
    step.chmod(0o755)
    program = (
        "import pathlib, sys\nfrom vqrae.common.errors import exit_code\n"
        "from vqrae.quickstart import pipeline as q\n"
        "sys.executable, folder = sys.argv[1:]\n"
        "steps = lambda *names: [q.Step(name, 'x', [name], 1) for name in names]\n"
        "branches = [steps('a', 'again'), steps('b', 'again')]\n"
        "run = lambda: q.run_phase(branches, q.Clock(pathlib.Path(folder)))\n"
        "sys.exit(exit_code(run, 'quickstart'))"
    )
    command = [sys.executable, "-c", program, str(step), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = [tmp_path / "a", tmp_path / "b"]
    written = lambda path: path.exists() and path.read_text().endswith("\n")  # noqa: E731
    while process.poll() is None and not all(map(written, begun)):
        time.sleep(0.05)
    process.terminate()
    assert "quickstart: terminated" in process.communicate(timeout=30)[1]
    assert process.returncode == 143
    assert not any((Path("/proc") / path.read_text().strip()).exists() for path in begun)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "0", "many"])
def test_minutes_are_a_positive_number(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes"):
        quickstart.main([f"--output={tmp_path / 'out'}", f"--minutes={minutes}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_step_is_named_and_its_time_kept(tmp_path: Path) -> None:
    step = quickstart.Step("encoder", "quickstart.pipeline", ["no_such_key=1"], 1)
    clock = quickstart.Clock(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        quickstart.run(step, clock)
    assert stopped.value.code == 2
    state = read_json(tmp_path / "encoder.json")
    assert state["seconds"] > 0
    assert not state["done"]
