"""Fréchet statistics: one matrix product per batch beside an outer product per image, as public evaluators do it.

And the distance itself: eigenvalues of a symmetric matrix beside a general matrix square root.
"""

from functools import partial

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from vqrae.benchmarks.harness import Row, compare
from vqrae.eval.reconstruction.frechet import FeatureStatistics, frechet_distance

WIDTH = 2048  # of Inception
IMAGES, BATCH_SIZE = 256, 64
DISTANCE_WIDTH = 512  # a matrix square root at 2048 takes minutes


def batched(features: Tensor, batch_size: int) -> FeatureStatistics:
    """Ours."""
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def outer_products(features: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of features and sum of their outer products in float64, one image at a time -> mean, covariance."""
    count, width = features.shape
    total = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    for feature in features:
        total += feature
        products += torch.outer(feature, feature)
    return total / count, (products - torch.outer(total, total) / count) / (count - 1)


def root_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The distance by a general matrix square root."""
    first, second = a.covariance.numpy(), b.covariance.numpy()
    root = np.trace(scipy.linalg.sqrtm(first @ second).real)
    return float((a.mean - b.mean).square().sum() + np.trace(first) + np.trace(second) - 2 * root)


def run(
    width: int = WIDTH, images: int = IMAGES, distance_width: int = DISTANCE_WIDTH, repeats: int = 3
) -> list[Row]:
    """Seconds of statistics and of the distance.

    Raises:
        AssertionError: when the two ways do not give the same.
    """
    torch.manual_seed(0)
    features = torch.rand(images, width)
    mean, covariance = outer_products(features)
    ours = batched(features, BATCH_SIZE)
    torch.testing.assert_close(ours.mean, mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        ours.covariance, covariance, rtol=1e-5, atol=1e-7
    )  # their products are float32
    rows = []
    for batch_size in (BATCH_SIZE, 16):
        seconds = compare(
            partial(batched, features, batch_size), partial(outer_products, features), repeats
        )
        rows.append(
            Row(f"statistics, {images} x {width}, batches of {batch_size}", *seconds, unit="s")
        )

    mixing = torch.randn(distance_width, distance_width)
    a, b = (
        batched(torch.randn(4 * distance_width, distance_width) @ mixing + i, BATCH_SIZE)
        for i in range(2)
    )
    expected = root_distance(a, b)
    assert abs(frechet_distance(a, b) - expected) < 1e-6 * expected
    seconds = compare(lambda: frechet_distance(a, b), lambda: root_distance(a, b), repeats)
    rows.append(Row(f"distance, {distance_width} features", *seconds, unit="s"))
    return rows
