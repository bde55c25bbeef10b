"""The check of a GPU, on one that is not there: every row is reached, and a row that fails costs no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu

from benchmarks import check_gpu
from benchmarks.check_gpu import Case, check, text

CUDA = torch.device("cuda")


def no_memory(device: torch.device) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")


def failure(device: torch.device) -> Any:
    raise RuntimeError("a kernel failed\nSearch for it in the manual")


def product(device: torch.device) -> Any:
    """Two products of 64 x 64: 2 x 2 x 64^3 FLOP, which take a second by this test's clock."""
    matrix = torch.randn(64, 64, device=device)
    return lambda: matrix @ matrix @ matrix


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "time_of", lambda run, **options: (run(), 1.0)[1])
    monkeypatch.setattr(check_gpu, "RATE_SIZE", 64)


def test_a_row_that_fails_says_so_and_the_others_are_measured() -> None:
    cases = [
        Case("equal", lambda device: [1.0, 2.0], product, (4, "images")),
        Case("no memory", None, no_memory),
        Case("another loss", lambda device: [1.0, 2.1], product),
        Case("another code", lambda device: [9_999, 1], product),
        Case("not a number", lambda device: [float("nan")], product),
        Case("failure", None, failure),
        Case("speed alone", None, product),
    ]
    expected = {
        "equal": [1.0, 2.001],
        "another loss": [1.0, 2.0],
        "another code": [10_000, 1],
        "not a number": [1.0],
    }
    with fake_gpu():
        report = check(cases, expected, minutes=1, device=CUDA)
    rows = {row["name"]: row for row in report["rows"]}
    problems = {name: row["problem"] for name, row in rows.items() if row["problem"]}
    assert problems == {
        "no memory": "out of memory",
        "another loss": "not equal to the CPU",
        "another code": "not equal to the CPU",
        "not a number": "not equal to the CPU",
        "failure": "RuntimeError: a kernel failed",
    }
    assert rows["equal"]["deviation"] == pytest.approx(0.001 / 2.001)
    assert (rows["equal"]["rate"], rows["equal"]["unit"]) == (4, "images/s")
    assert rows["speed alone"]["tflop"] == pytest.approx(4 * 64**3 / 1e12)
    assert rows["speed alone"]["share"] == pytest.approx(2)  # the rate's product takes a second too
    assert json.loads(json.dumps(report)) == report
    assert "fake GPU" in text(report)
    assert "| no memory |" in text(report)


def test_rows_that_the_time_does_not_reach_say_so() -> None:
    with fake_gpu():
        report = check([Case("late", None, product)], {}, minutes=0, device=CUDA)
    assert report["rows"][0]["problem"] == "out of time"


def test_the_rows_are_the_hot_paths() -> None:
    names = [case.name for case in check_gpu.cases()]
    assert len(names) == len(set(names)) == 6 + 4 + 2 + 1 + 12
    for part in (
        "internvit_448, stage 2",
        "TF32",
        "bf16, exact",
        "7B",
        "generator",
        "compiled, 1024 codes, batch 64",
    ):
        assert any(part in name for name in names), part
    compared = {name.partition(",")[0] for name in names if "sampler" in name}
    assert compared == {"sampler eager", "sampler compiled"}


def test_the_search_and_the_sampler_run_as_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        **check_gpu.QWEN3_0_6B,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
    }
    monkeypatch.setattr(
        check_gpu, "QWEN3_0_6B", {**small, "num_key_value_heads": 1, "head_dim": 16}
    )
    with fake_gpu():
        assert check_gpu.search(64, "bf16", True, True, CUDA)().shape == (64,)
        assert check_gpu.sampler(4, 2, False, CUDA, layers=2)().shape == (2, 4)


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    with fake_gpu(0), pytest.raises(ValueError, match="got no GPU, expected one that PyTorch sees"):
        check_gpu.main([f"output={tmp_path / 'report.json'}"])
