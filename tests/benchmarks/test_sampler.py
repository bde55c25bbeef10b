"""The benchmark of sampling runs and checks itself: greedy tokens equal those of transformers, guidance included."""

import pytest

from vqrae.benchmarks import sampler
from vqrae.generation.vocabulary import VisualVocabulary

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sampler, "peak_memory", lambda *_: 1.0
    )  # tested with the harness; a process of its own takes seconds
    rows = sampler.run(
        VisualVocabulary(offset=100, codebook_size=64, num_codes=16), TINY, batch_size=4, repeats=1
    )
    assert [row.unit for row in rows] == ["images/s", "MiB"]
    assert all(row.ratio > 0 for row in rows)
