"""Every benchmark at a small size: both ways give the same, and every row is measured."""

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import extract, harness, loss, quantizer, sampler
from benchmarks.__main__ import NAMES, main
from vqrae.common.config import ConfigError
from vqrae.generation.modeling import VisualVocabulary

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
HEADS = {**TINY, "num_key_value_heads": 1, "head_dim": 16}
ENCODER = {**extract.ENCODER, **TINY, "num_hidden_layers": 1, "image_size": 32}
SMALL: dict[str, dict[str, Any]] = {
    "quantizer": {"sizes": (300, 200, 16), "several": (300, 2, 50, 8)},
    "frechet": {"width": 64, "images": 64, "distance_width": 16},
    "packing": {"count": 4, "micro_batch_size": 2},
    "sampler": {
        "vocabulary": VisualVocabulary(offset=100, codebook_size=64, num_codes=16),
        "shape": {**HEADS, "num_hidden_layers": 2, "initializer_range": 0.3},
        "batch": 4,
    },
    "loss": {
        "vocabulary": VisualVocabulary(offset=2000, codebook_size=200, num_codes=32),
        "shape": {**loss.SHAPE, **HEADS},
        "length": 48,
        "layers": 1,
    },
    "extract": {
        "tokenizer": {"encoder_config": ENCODER, "codebook_size": 64, "codebook_dim": 32},
        "images": 3,
        "batch_size": 2,
    },
    "training": {"batch": 2, "steps": 2},
}
UNITS = {
    "quantizer": ["s", "MiB", "s", "MiB", "s", "s", "s"],
    "frechet": ["s", "s"],
    "packing": ["tokens/s"],
    "sampler": ["images/s", "MiB", "positions/s"],
    "loss": ["MiB", "MiB", "s", "s"],
    "extract": ["images/s", "bytes"],
    "training": ["samples/s"] * 4,
}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What peak memory is measured of runs here: a process of its own takes seconds."""

    def call(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
        prepare(*arguments)()
        return 1.0

    monkeypatch.setattr(harness, "peak_memory", call)


@pytest.mark.parametrize("name", NAMES)
def test_rows(name: str, in_this_process: None) -> None:
    rows = importlib.import_module(f"benchmarks.{name}").run(**SMALL[name], repeats=1)
    assert [row.unit for row in rows] == UNITS[name]
    assert all(min(row.ours, row.reference, row.ratio) > 0 for row in rows)


def test_other_codes_are_no_result(monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:
    monkeypatch.setattr(quantizer, "usual_search", lambda *_: torch.zeros(30, dtype=torch.long))
    with pytest.raises(AssertionError, match="codes differ from the reference's"):
        quantizer.run((30, 20, 4), repeats=1)
    monkeypatch.setattr(sampler, "sample_codes", lambda *_: torch.zeros(4, 16, dtype=torch.long))
    with pytest.raises(AssertionError, match="find different codes"):
        sampler.run(**SMALL["sampler"], repeats=1)


def test_timings_alternate_and_a_rate_is_work_per_second() -> None:
    calls: list[str] = []
    ours, reference = (lambda: calls.append("ours")), (lambda: calls.append("reference"))
    row = harness.time_row("case", ours, reference, repeats=2, work=6, unit="steps/s")
    assert calls == ["ours", "reference"] * 3
    assert row.ratio == pytest.approx(row.ours / row.reference)


@pytest.mark.slow
def test_peak_memory_counts_what_a_function_allocates() -> None:
    mebibytes = harness.peak_memory(functools.partial, operator.mul, b"x", 64 * harness.MIB)
    assert mebibytes == pytest.approx(64, abs=4)


def test_unknown_benchmark_suggests_a_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'quantizer'"):
        main(["quantiser"])
