"""The benchmark of Fréchet statistics runs and checks itself."""

from vqrae.benchmarks import frechet


def test_rows() -> None:
    rows = frechet.run(width=64, images=64, distance_width=16, repeats=1)
    assert len(rows) == 3
    assert all(row.ratio > 0 and row.unit == "s" for row in rows)
