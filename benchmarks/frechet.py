"""Fréchet statistics: a matrix product per batch vs an outer product per image.

Public evaluators do the latter. And the distance itself: eigenvalues of a symmetric matrix vs a
general matrix square root.
"""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from benchmarks.harness import Row, time_row
from vqrae.eval.reconstruction.frechet import FeatureStatistics, frechet_distance

WIDTH = 2048  # of Inception
IMAGES, BATCH_SIZE = 256, 64
DISTANCE_WIDTH = 512  # a matrix square root at 2048 takes minutes


def batched(features: Tensor, batch_size: int = BATCH_SIZE) -> FeatureStatistics:
    """Ours."""
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def outer_products(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance from float64 sums over one image at a time."""
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
    torch.manual_seed(0)
    features = torch.rand(images, width)
    mean, covariance = outer_products(features)
    ours = batched(features)
    torch.testing.assert_close(ours.mean, mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.covariance, covariance, rtol=1e-5, atol=1e-7)  # fp32 products
    case = f"statistics, {images} x {width}, batches of {BATCH_SIZE}"
    work = (lambda: batched(features)), (lambda: outer_products(features))
    rows = [time_row(case, *work, repeats=repeats)]

    mixing = torch.randn(distance_width, distance_width)
    a = batched(torch.randn(4 * distance_width, distance_width) @ mixing)
    b = batched(torch.randn(4 * distance_width, distance_width) @ mixing + 1)
    expected = root_distance(a, b)
    assert abs(frechet_distance(a, b) - expected) < 1e-6 * expected
    distances = (lambda: frechet_distance(a, b)), (lambda: root_distance(a, b))
    case = f"distance, {distance_width} features"
    return [*rows, time_row(case, *distances, repeats=repeats)]
