"""Streaming statistics and distances against numpy and scipy."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from vqrae.eval.reconstruction.frechet import FeatureStatistics, InceptionScore, frechet_distance


def statistics(features: np.ndarray, batch_size: int = 7) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    for batch in torch.from_numpy(features).split(batch_size):
        result.update(batch)
    return result


def draw(count: int, width: int, seed: int, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + offset


@pytest.mark.parametrize(
    "offset", [0.0, 1e4]
)  # about zero, sums of squares of the second would lose eight digits
def test_statistics_are_those_of_numpy(offset: float) -> None:
    features = draw(100, 16, seed=0, offset=offset)
    ours = statistics(features)
    np.testing.assert_allclose(ours.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.covariance, np.cov(features, rowvar=False), rtol=1e-6)
    assert ours.count == 100


def test_merged_statistics_are_those_of_all() -> None:
    features = draw(101, 8, seed=1)
    merged = statistics(features[:40])
    merged.merge(FeatureStatistics(8))
    merged.merge(statistics(features[40:]))
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-9)


def test_distance_is_that_of_the_matrix_square_root() -> None:
    a, b = draw(300, 12, seed=2), draw(300, 12, seed=3, offset=0.5)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    offset = a.mean(0) - b.mean(0)
    expected = offset @ offset + np.trace(
        cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real
    )
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-8)


def test_distance_of_fewer_images_than_features() -> None:
    a, b = draw(10, 32, seed=4), draw(10, 32, seed=5)
    assert frechet_distance(statistics(a), statistics(a)) == pytest.approx(
        0, abs=1e-4 * np.cov(a, rowvar=False).trace()
    )
    distance = frechet_distance(statistics(a), statistics(b))
    assert np.isfinite(distance)
    assert distance == pytest.approx(frechet_distance(statistics(b), statistics(a)), rel=1e-6)


def test_features_that_are_not_finite_have_no_distance() -> None:
    broken = statistics(np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(broken, statistics(draw(5, 4, seed=0)))


def test_distance_of_known_gaussians() -> None:
    """Diagonal covariances: the sum of (difference of means)^2 + (difference of deviations)^2."""
    a, b = FeatureStatistics(3), FeatureStatistics(3)
    a.count = b.count = 2
    a.scatter, b.scatter = torch.diag(torch.tensor([1.0, 4.0, 9.0])).double(), torch.eye(3).double()
    b.mean = torch.tensor([1.0, 0.0, 0.0]).double()
    assert frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4)


def test_files(tmp_path: Path) -> None:
    path, identity = (
        tmp_path / "reference.npz",
        {"data": "scenes", "protocol": {"rounding": "round"}},
    )
    original = statistics(draw(50, 4, seed=6))
    original.save(path, identity)
    loaded = FeatureStatistics.load(path, identity)
    torch.testing.assert_close(loaded.covariance, original.covariance)
    with pytest.raises(ValueError, match=r"protocol: the file has .*round.*this run .*truncate"):
        FeatureStatistics.load(path, {**identity, "protocol": {"rounding": "truncate"}})
    with pytest.raises(ValueError, match="network: the file has None"):
        FeatureStatistics.load(path, {**identity, "network": "inception"})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no reference statistics"):
        FeatureStatistics.load(path, identity)
    with pytest.raises(ValueError, match="at least 2"):
        _ = statistics(draw(1, 4, seed=0)).covariance


def test_inception_score() -> None:
    score = InceptionScore(4)
    score.update(torch.zeros(8, 4))
    assert score.compute() == pytest.approx(1)  # no image is of any class
    score = InceptionScore(4)
    for batch in (100 * torch.eye(4)).split(3):
        score.update(batch)
    assert score.compute() == pytest.approx(4)  # every image is of one class, all classes alike


def test_inception_score_is_that_of_torch_fidelity() -> None:
    logits = 3 * torch.randn(100, 1008, generator=torch.Generator().manual_seed(0))
    score = InceptionScore(1008)
    for batch in logits.split(33):
        score.update(batch)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert score.compute() == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


@pytest.mark.parametrize(("first", "second", "width"), [(200, 150, 16), (10, 14, 16)])
def test_distance_is_that_of_torch_fidelity(first: int, second: int, width: int) -> None:
    a, b = draw(first, width, seed=7), draw(second, width, seed=8, offset=0.3)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False
    )
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-6
    )
