"""A small campaign: real processes, killed at file-system events, repair themselves; and the campaign sees what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqrae.common.files import read_json
from vqrae.scripts.check_kill import Events, Outcome, is_temporary, judge, result_of, table


@pytest.mark.slow
def test_a_killed_training_is_repaired_by_the_same_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vqrae.scripts.check_kill",
        "jobs=llm",
        "kills=3",
        f"output={tmp_path}",
    ]
    done = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = read_json(tmp_path / "report.json")["jobs"]["llm"]
    assert outcome["kills"] >= 2  # one comes at a time, maybe behind the end
    assert outcome["equal"] == 3
    assert "| llm |" in done.stdout


def test_the_campaign_sees_every_kind_of_loss(tmp_path: Path) -> None:
    output, log = tmp_path / "output", tmp_path / "log"
    (output / "model").mkdir(parents=True)
    (output / "checkpoint-2").mkdir()
    (output / "model" / "config.json").write_text("1")
    (output / "checkpoint-2" / "config.json").touch()
    (output / "manifest.json").write_text("today")
    (output / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "samples_per_second": 3.0}\n')
    log.write_text("an error\n")
    expected = result_of(output)
    assert set(expected) == {"model/config.json", "checkpoint-2", "manifest.json", "metrics.jsonl"}
    outcome = Outcome()
    assert judge(outcome, "0", "", output, expected, log)
    (output / "manifest.json").write_text("tomorrow")
    assert judge(outcome, "0", "", output, expected, log)
    (output / ".model.tmp").mkdir()
    assert not judge(outcome, "0", "", output, expected, log)
    (output / "model" / "config.json").write_text("2")
    assert not judge(outcome, "0", "", output, expected, log)
    (output / "model" / "config.json").unlink()
    assert not judge(outcome, "0", "", output, expected, log)
    assert not judge(outcome, "1", "", output, expected, log)
    assert not judge(outcome, "hang", "", output, expected, log)
    counts = (
        outcome.equal,
        outcome.different,
        outcome.lost,
        outcome.errors,
        outcome.hangs,
        outcome.left_over,
    )
    assert counts == (3, 1, 1, 1, 1, 5)
    assert "| **all** | 0 | 3 | 1 | 1 | 1 | 1 | 5 |" in table({"job": outcome})
    assert not is_temporary(output / ".lock")


def test_events_are_changes_below_the_folder(tmp_path: Path) -> None:
    events = Events(tmp_path)
    for event, arguments, counts in (
        ("open", (str(tmp_path / "a"), "w", os.O_WRONLY), 1),
        ("open", (str(tmp_path / "a"), "r", os.O_RDONLY), 0),
        ("open", ("/elsewhere", "w", os.O_WRONLY), 0),
        ("os.rename", (tmp_path / "a", tmp_path / "b", -1, -1), 1),
        ("os.remove", ("model.safetensors", 5), 1),  # as rmtree does
        ("os.listdir", (str(tmp_path),), 0),
    ):
        before = events.count
        events(event, arguments)
        assert events.count - before == counts, (event, arguments)
