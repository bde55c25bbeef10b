"""Streaming statistics and distances against numpy, scipy and torch-fidelity."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from vqrae.eval.reconstruction.frechet import FeatureStatistics, InceptionScore, frechet_distance


def statistics(features: np.ndarray, batch_size: int = 7) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    for batch in torch.from_numpy(features).split(batch_size):
        result.update(batch)
    return result


def gaussian(count: int, width: int, seed: int, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + offset


# About zero, sums of squares of the second would lose eight digits.
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_are_those_of_numpy(offset: float) -> None:
    features = gaussian(100, 16, seed=0, offset=offset)
    ours = statistics(features)
    np.testing.assert_allclose(ours.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.covariance, np.cov(features, rowvar=False), rtol=1e-6)
    assert ours.count == 100


# With fewer images than features, covariances are singular.
@pytest.mark.parametrize(("first", "second", "width"), [(200, 150, 16), (10, 14, 16)])
def test_distance_is_that_of_torch_fidelity(first: int, second: int, width: int) -> None:
    a, b = gaussian(first, width, seed=7), gaussian(second, width, seed=8, offset=0.3)
    theirs = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    distance = frechet_distance(statistics(a), statistics(b))
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert distance == pytest.approx(expected, rel=1e-6)
    assert distance == pytest.approx(frechet_distance(statistics(b), statistics(a)), rel=1e-6)
    scale = statistics(a).covariance.trace().item()
    assert frechet_distance(statistics(a), statistics(a)) == pytest.approx(0, abs=1e-4 * scale)


def test_features_that_are_not_finite_have_no_distance() -> None:
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(statistics(np.full((3, 4), np.nan)), statistics(gaussian(5, 4, seed=0)))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    identity = {"data": "scenes", "protocol": {"rounding": "round"}}
    original = statistics(gaussian(50, 4, seed=6))
    original.save(path, identity)
    loaded = FeatureStatistics.load(path, identity)
    torch.testing.assert_close(loaded.covariance, original.covariance)
    with pytest.raises(ValueError, match=r"protocol .*round.* -> .*truncate"):
        FeatureStatistics.load(path, {**identity, "protocol": {"rounding": "truncate"}})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no reference statistics"):
        FeatureStatistics.load(path, identity)


def test_inception_score_is_that_of_torch_fidelity() -> None:
    logits = 3 * torch.randn(100, 1008, generator=torch.Generator().manual_seed(0))
    score = InceptionScore(1008)
    for batch in logits.split(33):
        score.update(batch)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert score.compute() == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
