"""A small campaign: killed processes repair themselves, and the campaign sees every loss."""

from collections import Counter
from pathlib import Path

import pytest
from processes import launch

from vqrae.common.files import read_json
from vqrae.scripts.check_kill import judge, result_of, table


@pytest.mark.slow
def test_a_killed_training_is_repaired_by_the_same_command(tmp_path: Path) -> None:
    options = ["jobs=llm", "kills=1", f"output={tmp_path}"]
    printed = launch("vqrae.scripts.check_kill", options, processes=1)
    outcome = read_json(tmp_path / "report.json")["jobs"]["llm"]
    assert outcome["kills"] == outcome["equal"] == 1
    assert "| llm |" in printed


def test_the_campaign_sees_every_kind_of_loss(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    weights = tmp_path / "model" / "config.json"
    weights.write_text("1")
    (tmp_path / "checkpoint-2" / "config.json").touch()
    (tmp_path / ".lock").touch()
    (tmp_path / "manifest.json").write_text("today")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "samples_per_second": 3.0}\n')
    expected = result_of(tmp_path)
    files = {"model/config.json", "manifest.json", "metrics.jsonl", ".lock"}
    assert set(expected) == files | {"checkpoint-2"}
    (tmp_path / "manifest.json").write_text("tomorrow")
    assert judge("0", tmp_path, expected) == {"equal": []}
    (tmp_path / ".model.tmp").mkdir()
    assert judge("0", tmp_path, expected) == {"equal": [], "left over": [".model.tmp"]}
    (tmp_path / ".model.tmp").rmdir()
    weights.write_text("2")
    assert judge("0", tmp_path, expected) == {"different": ["model/config.json"]}
    weights.unlink()
    assert judge("0", tmp_path, expected) == {"lost": ["model/config.json"]}
    assert judge("1", tmp_path, expected) == {"errors": ["1"]}
    assert judge("hang", tmp_path, expected) == {"hangs": ["hang"]}
    outcomes = {"a": Counter(kills=2, equal=1, lost=1), "b": Counter({"kills": 1, "left over": 1})}
    assert "| **all** | 3 | 1 | 0 | 0 | 0 | 1 | 1 |" in table(outcomes)
