"""Batches keep their size on any number of processes."""

import re

import pytest

from vqrae.common.distributed import fit_batch


def test_global_batch_is_kept_or_refused() -> None:
    assert fit_batch(256, 16, 8) == (16, 2)
    assert fit_batch(32, 32, 2) == (16, 1)  # more processes than the micro-batch was chosen for


@pytest.mark.parametrize(
    ("batch", "micro", "processes"),
    [(256, 16, 6), (256, 16, 3), (256, 12, 8), (2, 1, 3), (96, 20, 4)],
)
def test_advice_on_batches_works(batch: int, micro: int, processes: int) -> None:
    with pytest.raises(ValueError, match="global_batch_size") as error:
        fit_batch(batch, micro, processes)
    advice = str(error.value).partition(": ")[2]
    numbers = [int(number) for number in re.findall(r"\d+", advice)]
    if "micro_batch_size to" in advice:
        assert fit_batch(batch, numbers[0], processes)[0] == numbers[0]
    else:
        *counts, multiple_of, example = numbers
        assert multiple_of == processes
        assert all(fit_batch(batch, 1, count) for count in counts)
        assert fit_batch(example, 1, processes)
