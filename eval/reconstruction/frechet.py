"""Fréchet distance of feature sets (arXiv 1706.08500), and the Inception score, as sums that stream and merge.

Shapes: B batch, D feature width, C classes.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from vqrae.common.distributed import sum_over_processes
from vqrae.common.files import atomic_path


class FeatureStatistics:
    """Mean and covariance of features in float64, whatever their number.

    A batch enters by one matrix product about its own mean (Chan, Golub and LeVeque 1983): exact where a sum of squares
    about zero would cancel, and much faster than an outer product for each image.

    Args:
        width: D.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features (B, D)."""
        features = features.to(self.mean)
        mean = features.mean(0)
        centered = features - mean
        self._join(len(features), mean, centered.T @ centered)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add what another one has seen."""
        self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        offset = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(offset, offset, alpha=self.count * count / total)
        self.mean = self.mean + offset * (count / total)
        self.count = total

    def reduce(self) -> None:
        """Become the statistics of all processes together."""
        count = torch.tensor([self.count], dtype=torch.int64, device=self.mean.device)
        mean = self.mean * self.count
        sum_over_processes(count)
        sum_over_processes(mean)
        mean /= count
        offset = self.mean - mean
        self.scatter.addr_(offset, offset, alpha=self.count)
        sum_over_processes(self.scatter)
        self.count, self.mean = int(count.item()), mean

    @property
    def covariance(self) -> Tensor:
        """Sample covariance (D, D), as `numpy.cov`.

        Raises:
            ValueError: for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(
                f"got features of {self.count} images, expected at least 2 for a covariance"
            )
        return self.scatter / (self.count - 1)

    # ---- files

    def save(self, path: str | Path, identity: dict[str, Any]) -> None:
        """Write the statistics to an .npz, with what they are statistics of."""
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            mu, sigma = self.mean.cpu().numpy(), self.covariance.cpu().numpy()
            np.savez(stream, mu=mu, sigma=sigma, count=self.count, identity=json.dumps(identity))

    @classmethod
    def load(cls, path: str | Path, identity: dict[str, Any]) -> "FeatureStatistics":
        """Read what `save` wrote.

        Raises:
            ValueError: when the file is none, or holds statistics of anything else, naming what differs.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                mu, sigma, count, found = (
                    stored["mu"],
                    stored["sigma"],
                    int(stored["count"]),
                    str(stored["identity"]),
                )
                found = json.loads(found)
        except (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} holds no reference statistics: {error}. Delete it, it will be made again"
            ) from error
        wanted = json.loads(json.dumps(identity))  # tuples become lists
        differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
        if differing:
            lines = [
                f"{key}: the file has {found.get(key)!r}, this run {wanted.get(key)!r}"
                for key in differing
            ]
            raise ValueError(
                f"{path} holds statistics of something else. "
                + "; ".join(lines)
                + ". Name another folder, or delete the file"
            )
        statistics = cls(len(mu))
        statistics.count, statistics.mean = count, torch.from_numpy(mu)
        statistics.scatter = torch.from_numpy(sigma) * (count - 1)
        return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0.

    The trace of the root is taken from the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and has those of A B: real
    ones, also where a covariance is singular, as it is for fewer images than features.

    Raises:
        ValueError: for fewer than two samples on a side, or features that are not finite.
    """
    first, second = a.covariance.cpu().numpy(), b.covariance.cpu().numpy()
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("got features that are not finite: the network or its input holds NaN")
    values, vectors = scipy.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_of_root = np.sqrt(scipy.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    offset = (a.mean.cpu() - b.mean.cpu()).square().sum().item()
    return max(0.0, offset + float(np.trace(first) + np.trace(second) - 2 * trace_of_root))


class InceptionScore:
    """exp of the mean divergence of an image's class distribution from that of all images (arXiv 1606.03498).

    One split over all images, as in the evaluators of tokenizers; generators are often scored in ten, which gives less.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.totals = torch.zeros(
            2, dtype=torch.float64, device=device
        )  # negative entropies, images

    def update(self, logits: Tensor) -> None:
        """Add class logits (B, C)."""
        logs = logits.to(self.sums).log_softmax(1)
        shares = logs.exp()
        self.sums += shares.sum(0)
        self.totals += torch.stack([(shares * logs).sum(), self.totals.new_tensor(len(logits))])

    def reduce(self) -> None:
        """Become the sums of all processes together."""
        sum_over_processes(self.sums)
        sum_over_processes(self.totals)

    def compute(self) -> float:
        """The score, from 1 to C."""
        negative_entropy, count = self.totals
        mean = self.sums / count
        return torch.exp(negative_entropy / count - torch.special.xlogy(mean, mean).sum()).item()
