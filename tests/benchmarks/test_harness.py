import functools
import json
import operator
from pathlib import Path

import pytest

from vqrae.benchmarks.__main__ import NAMES, main
from vqrae.benchmarks.harness import MIB, Row, compare, peak_memory, write_table


def test_comparison_alternates_and_drops_the_first_run() -> None:
    calls: list[str] = []
    ours, reference = compare(
        lambda: calls.append("ours"), lambda: calls.append("reference"), repeats=2
    )
    assert calls == ["ours", "reference"] * 3
    assert 0 <= ours < 1
    assert 0 <= reference < 1


@pytest.mark.slow
def test_peak_memory_counts_what_a_function_allocates() -> None:
    assert peak_memory(functools.partial, operator.mul, b"x", 64 * MIB) == pytest.approx(64, abs=4)


def test_table_says_who_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("search", 1.0, 2.0, "s"),
        Row("reading", 30.0, 10.0, "images/s", higher_is_better=True),
    ]
    found = json.loads(write_table("trivial", rows, tmp_path).read_text())
    assert found["rows"][0] == {
        "case": "search",
        "ours": 1.0,
        "reference": 2.0,
        "unit": "s",
        "ratio": 2.0,
    }
    assert found["rows"][1]["ratio"] == 3.0
    assert "3.00x" in capsys.readouterr().out


def test_unknown_benchmark_suggests_a_name() -> None:
    assert "harness" not in NAMES
    with pytest.raises(SystemExit, match="unknown benchmark 'quantiser'"):
        main(["quantiser"])
