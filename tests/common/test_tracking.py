"""Trackers get what a run logs, once, and go on where an earlier launch ended."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vqrae.common import run as runs
from vqrae.common.run import Run
from vqrae.common.tracking import TrackerName

ALL: tuple[TrackerName, ...] = ("tensorboard", "wandb", "trackio")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both services keep everything in this folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def log(run: Run, steps: range) -> None:
    for step in steps:
        run.log(step, {"loss": 1 / step})
    run.log_images(steps[-1], {"samples": Image.new("RGB", (8, 4), "red")})
    run.log_histograms(steps[-1], {"code_use": np.arange(16.0)})


def test_every_tracker_has_every_step_once_after_a_resume(tmp_path: Path, offline: None) -> None:
    import trackio
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "tokenizer" / "stage1"
    for first, end in ((1, 5), (3, 7)):  # the second launch goes on from a checkpoint of step 2
        run = runs.open(folder, report_to=ALL)
        run.begin()
        run.rewind(first - 1)
        log(run, range(first, end))
    trackio.finish()

    events = EventAccumulator(str(folder / "events"), {"histograms": 0}).Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("samples")] == [4, 6]
    assert [event.step for event in events.Histograms("code_use")] == [4, 6]

    folders = list(folder.glob("wandb/offline-run-*"))
    ids = {
        path.name.split("-")[3] for path in folders
    }  # launches of one second are numbered after it
    assert len(ids) == 1, "one id for both launches"
    assert [len(list(path.rglob("*.png"))) for path in folders] == [1, 1]

    (name,) = SQLiteStorage.get_runs("vqrae")
    rows = SQLiteStorage.get_logs("vqrae", name)
    assert name.startswith("tokenizer-stage1-")
    assert Counter(row["step"] for row in rows if "loss" in row) == Counter(range(1, 7))
    for kind in ("samples", "code_use"):
        assert [row["step"] for row in rows if kind in row] == [4, 6]


def test_a_missing_package_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec: Any = importlib.util.find_spec
    lacking = lambda name, *rest: None if name == "trackio" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    with pytest.raises(ValueError, match=r"report_to=trackio needs the package trackio.*install"):
        runs.open(tmp_path / "run", report_to=["tensorboard", "trackio"])
    assert not (tmp_path / "run").exists()
