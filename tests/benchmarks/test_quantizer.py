import pytest
import torch

from vqrae.benchmarks import quantizer


@pytest.mark.slow
def test_all_cases_at_a_small_size() -> None:
    rows = quantizer.run(num_features=4096, codebook_size=2048, codebook_dim=16, repeats=1)
    assert [row.case for row in rows] == [
        "search fp32, time",
        "search bf16, time",
        "search fp32, memory",
        "search bf16, memory",
        "simvq gradient, time",
    ]
    memory = rows[2]
    assert memory.reference == pytest.approx(3 * 4096 * 2048 * 4 / 1024**2, rel=0.2)  # three matrices of all distances


def test_different_codes_are_no_result() -> None:
    with pytest.raises(RuntimeError, match="1 of 3 codes differ"):
        quantizer.require_equal(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
