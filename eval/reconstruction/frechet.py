"""Fréchet distances between sets of images, and the Inception score, as sums that stream.

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
from vqrae.common.run import refuse_other_settings


class FrechetMetric:
    """Fréchet distance of originals and copies in one network's features; rFID if it is Inception.

    The folder `reference` keeps the statistics of the originals; they must have the same
    `identity`.
    """

    def __init__(
        self,
        network: Any,
        device: torch.device | str = "cpu",
        reference: str | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.network = network.to(device)
        self.key = "rfid" if network.name == "inception" else f"frechet_{network.name}"
        self.file = Path(reference) / f"{network.name}.npz" if reference else None
        self.identity = {**(identity or {}), "network": network.identity}
        self.originals = FeatureStatistics(network.width, device)
        self.is_known = self.file is not None and self.file.exists()
        if self.file and self.is_known:
            self.originals = FeatureStatistics.load(self.file, self.identity)
        self.copies = FeatureStatistics(network.width, device)
        classes = network.num_classes
        self.score = InceptionScore(classes, device) if classes else None

    def update(self, images: Tensor, copies: Tensor) -> None:
        """Add a batch, both (B, 3, H, W) at the levels that the protocol wants."""
        if not self.is_known:
            self.originals.update(self.network(images)[0])
        features, logits = self.network(copies)
        self.copies.update(features)
        if self.score is not None:
            self.score.update(logits)

    def reduce(self) -> None:
        """Add up over all processes."""
        if not self.is_known:
            self.originals.reduce()
        self.copies.reduce()
        if self.score is not None:
            self.score.reduce()

    def keep_reference(self) -> None:
        """Write the statistics of the originals, if they were taken in this run."""
        if self.file and not self.is_known and self.originals.count > 1:
            self.originals.save(self.file, self.identity)

    def compute(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """The distance and, from Inception, the score; and by name why one is None.

        A distance that fails costs no other metric of the run.
        """
        values: dict[str, float | None] = {self.key: None}
        if self.score is not None:
            values["inception_score"] = self.score.compute()
        try:
            values[self.key] = frechet_distance(self.originals, self.copies)
        except ValueError as error:
            return values, {self.key: str(error)}
        return values, {}


class FeatureStatistics:
    """Mean and covariance of features of width D in float64, whatever their number.

    A batch enters by one matrix product about its own mean (Chan, Golub and LeVeque 1983): exact
    where a sum of squares about zero would cancel, and faster than an outer product per image.
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
        total = self.count + len(features)
        offset = mean - self.mean
        self.scatter += centered.T @ centered
        self.scatter.addr_(offset, offset, alpha=self.count * len(features) / total)
        self.mean = self.mean + offset * (len(features) / total)
        self.count = total

    def reduce(self) -> None:
        """Become the statistics of all processes together."""
        count = sum_over_processes(torch.tensor([self.count], device=self.mean.device))
        mean = sum_over_processes(self.mean * self.count) / count
        offset = self.mean - mean
        self.scatter.addr_(offset, offset, alpha=self.count)
        sum_over_processes(self.scatter)
        self.count = int(count.item())
        self.mean = mean

    @property
    def covariance(self) -> Tensor:
        """Sample covariance (D, D), as `numpy.cov`; ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(
                f"got features of {self.count} images, expected at least 2 for a covariance"
            )
        return self.scatter / (self.count - 1)

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write the statistics to an .npz, with what they are statistics of."""
        mu, sigma = self.mean.cpu().numpy(), self.covariance.cpu().numpy()
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, mu=mu, sigma=sigma, count=self.count, identity=json.dumps(identity))

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any]) -> "FeatureStatistics":
        """Read what `save` wrote; ValueError for another file, or statistics of other images."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = json.loads(str(stored["identity"]))
                statistics = cls(len(stored["mu"]))
                statistics.count = int(stored["count"])
                statistics.mean = torch.from_numpy(stored["mu"])
                statistics.scatter = torch.from_numpy(stored["sigma"]) * (statistics.count - 1)
        except (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} holds no reference statistics: {error}. Delete it to make it again"
            ) from error
        refuse_other_settings(path, found, identity, "name another folder, or delete it")
        return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0 (arXiv 1706.08500).

    The trace of the root is taken from the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and
    has those of A B: real ones, also where a covariance is singular because there are fewer images
    than features. Raises ValueError for fewer than two samples, or features that are not finite.
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
    """exp of the mean KL divergence of an image's distribution over C classes from that of all
    images.

    One split over all images (arXiv 1606.03498), as in the evaluators of tokenizers; generators are
    often scored in ten splits, which gives less.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(num_classes, dtype=torch.float64, device=device)
        # Negative entropies, and images.
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, logits: Tensor) -> None:
        """Add class logits (B, C)."""
        logs = logits.to(self.sums).log_softmax(1)
        probabilities = logs.exp()
        self.sums += probabilities.sum(0)
        count = self.totals.new_tensor(len(logits))
        self.totals += torch.stack([(probabilities * logs).sum(), count])

    def reduce(self) -> None:
        """Become the sums of all processes together."""
        sum_over_processes(self.sums)
        sum_over_processes(self.totals)

    def compute(self) -> float:
        """The score, from 1 to C."""
        negative_entropy, count = self.totals
        mean = self.sums / count
        return torch.exp(negative_entropy / count - torch.special.xlogy(mean, mean).sum()).item()
