"""The check of a GPU, on a fake one: every row is reached, and a row that fails costs no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu

from benchmarks import check_gpu
from benchmarks.check_gpu import Check, all_rows, run, text

CUDA = torch.device("cuda")


def path(found: list[float], problem: Exception | None = None) -> Any:
    """Two products of 64 x 64: 2 x 2 x 64^3 FLOP; exact, the numbers `found`."""

    def build(device: torch.device, exact: bool) -> Any:
        if problem is not None:
            raise problem
        matrix = torch.randn(64, 64, device=device)
        return lambda: found if exact else [matrix @ matrix @ matrix]

    return build


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a second."""
    monkeypatch.setattr(check_gpu, "time_of", lambda step, **options: (step(), 1.0)[1])
    monkeypatch.setattr(check_gpu, "RATE_SIZE", 64)


def test_a_row_that_fails_says_so_and_the_others_are_measured() -> None:
    memory = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
    rows = [
        Check("equal", path([1.0, 2.0]), 4, "images"),
        Check("no memory", path([], memory)),
        Check("another loss", path([1.0, 2.1])),
        Check("another code", path([9_999, 1])),
        Check("not a number", path([float("nan")])),
        Check("failure", path([], RuntimeError("a kernel failed\nsee the manual"))),
        Check("speed alone", path([]), compared=False),
    ]
    expected: dict[str, list[float]] = {"equal": [1.0, 2.001], "another loss": [1.0, 2.0]}
    expected |= {"another code": [10_000, 1], "not a number": [1.0]}
    with fake_gpu():
        report = run(rows, expected, minutes=1)
    found = {row["name"]: row for row in report["rows"]}
    for name, problem in (
        ("no memory", "out of memory"),
        ("another loss", "not equal to the CPU"),
        ("another code", "not equal to the CPU"),
        ("not a number", "not equal to the CPU"),
        ("failure", "RuntimeError: a kernel failed"),
    ):
        assert problem in found[name]["problem"]
        assert found[name]["seconds"] is None
    assert found["equal"]["deviation"] == pytest.approx(0.001 / 2.001)
    assert (found["equal"]["rate"], found["equal"]["unit"]) == (4, "images")
    assert found["speed alone"]["problem"] == ""
    assert found["speed alone"]["tflop"] == pytest.approx(4 * 64**3 / 1e12)
    assert found["speed alone"]["share"] == pytest.approx(2)  # the rate's product took a second too
    assert json.loads(json.dumps(report)) == report
    assert "fake GPU" in text(report)
    assert "| no memory |" in text(report)


def test_rows_that_the_time_does_not_reach_say_so() -> None:
    with fake_gpu():
        report = run([Check("late", path([]))], {}, minutes=0)
    assert report["rows"][0]["problem"] == "out of time"


def test_the_rows_are_the_hot_paths() -> None:
    names = [row.name for row in all_rows()]
    assert len(names) == len(set(names)) == 6 + 4 + 2 + 1 + 12
    compared = [row.name for row in all_rows() if row.compared]
    assert len(compared) == 6 + 4 + 2 + 1 + 2


def test_paths_give_numbers_and_run_as_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    monkeypatch.setattr(check_gpu, "QWEN3_0_6B", small)
    assert len(check_gpu.search("fp32", True, False, torch.device("cpu"), True)()) == 1024
    assert len(check_gpu.sampler(64, 8, False, torch.device("cpu"), True)()) == 2 * 16
    with fake_gpu():
        check_gpu.search("bf16", True, True, CUDA, False)()
        check_gpu.sampler(4, 2, False, CUDA, False)()


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    with fake_gpu(0), pytest.raises(ValueError, match="got no GPU, expected one that PyTorch sees"):
        check_gpu.main([f"output={tmp_path / 'report.json'}"])
