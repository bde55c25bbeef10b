from collections.abc import Callable

import pytest
import torch

from vqrae.benchmarks import quantizer


def test_all_cases_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.Tensor] = []

    def no_process(prepare: Callable[..., Callable[[], torch.Tensor]], *arguments: object) -> float:
        measured.append(prepare(*arguments)())
        return 1.0

    monkeypatch.setattr(quantizer, "peak_memory", no_process)
    rows = quantizer.run(num_features=300, codebook_size=200, codebook_dim=16, repeats=1)
    assert [row.case for row in rows] == [
        "search fp32, time",
        "search bf16, time",
        "search fp32, memory",
        "search bf16, memory",
        "simvq gradient, time",
    ]
    assert all(torch.equal(codes, measured[0]) for codes in measured)


def test_different_codes_are_no_result() -> None:
    with pytest.raises(RuntimeError, match="1 of 3 codes differ"):
        quantizer.require_equal(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
