"""The benchmark of the generator's loss runs and checks itself."""

import pytest

from vqrae.benchmarks import loss
from vqrae.generation.vocabulary import VisualVocabulary


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(prepare: object, *arguments: object) -> float:
        loss.prepare(*arguments)()  # type: ignore[arg-type]
        return 1.0

    monkeypatch.setattr(loss, "peak_memory", in_this_process)  # four processes take their time
    shape = {**loss.SHAPE, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    rows = loss.run(
        VisualVocabulary(offset=2000, codebook_size=200, num_codes=32),
        shape,
        length=48,
        layers=1,
        repeats=1,
    )
    assert [row.unit for row in rows] == ["MiB", "MiB", "s", "s"]
