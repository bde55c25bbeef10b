import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqrae.common.files import read_json
from vqrae.scripts import quickstart


def test_every_step_is_an_entry_point_and_lands_below_the_output(tmp_path: Path) -> None:
    steps = quickstart.pipeline(tmp_path, quickstart.plan(12), "emoji")
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert callable(importlib.import_module(f"vqrae.{step.module}").main)
        assert any(str(tmp_path) in argument for argument in step.arguments)


def test_minutes_scale_every_training_step() -> None:
    default, longer = quickstart.plan(12), quickstart.plan(90)
    assert default == quickstart.TRAINING_STEPS
    assert all(longer[name] == round(steps * 7.5) for name, steps in default.items())
    assert min(quickstart.plan(0.001).values()) >= 4


def test_a_plan_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def pretend(step: quickstart.Step, clock: quickstart.Clock) -> None:
        ran.append(step.name)
        clock.record(step.name, 1.0, done=step.name != "llm")
        if step.name == "llm" and ran.count("llm") == 1:
            raise SystemExit(1)

    monkeypatch.setattr(quickstart, "run", pretend)
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(tmp_path)])
    assert ran == ["encoder", "tokenizer", "eval_reconstruction", "llm"]
    quickstart.main(["--output", str(tmp_path)])
    assert ran[4:8] == ["llm", "understanding", "eval_understanding", "codes"]  # what was done is not done again
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(tmp_path), "--minutes", "90"])
    assert "was begun with other options" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_step_is_named_and_its_time_kept(tmp_path: Path) -> None:
    step = quickstart.Step("encoder", "tokenizer.pretrain_encoder", ["tiny_encoder", "no_such_key=1"], 1)
    clock = quickstart.Clock(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        quickstart.run(step, clock)
    assert stopped.value.code == 1
    state = read_json(tmp_path / "encoder.json")
    assert state["seconds"] > 0
    assert not state["done"]


def test_help_answers_at_once() -> None:
    command = [sys.executable, "-m", "vqrae.scripts.quickstart", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy(), timeout=60)
    assert result.returncode == 0
    assert "--minutes" in result.stdout
