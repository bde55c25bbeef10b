"""What frozen features say about labels: nearest neighbours, and a linear map in closed form.

Shapes: M samples, D feature width, C classes. Labels are int64 in 0 … C - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024  # queries compared at once with all neighbours
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the features' mean variance
HELD_OUT = 5  # every fifth sample chooses the ridge


@dataclass(frozen=True)
class LabelledFeatures:
    """Features (M, D) and labels (M,)."""

    features: Tensor
    labels: Tensor


def majority_share(asked: LabelledFeatures) -> float:
    """Accuracy of always answering the most frequent class."""
    return torch.bincount(asked.labels).max().item() / len(asked.labels)


def knn_accuracy(
    known: LabelledFeatures, asked: LabelledFeatures, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of samples whose class the k nearest known ones vote for, by cosine.

    The protocol of DINO (arXiv 2104.14294).

    Args:
        temperature: a neighbour of cosine c votes with weight exp(c / temperature).

    Raises:
        ValueError: for fewer known samples than neighbours.
    """
    if len(known.labels) < k:
        raise ValueError(
            f"got {len(known.labels)} samples to compare with, expected at least k = {k}"
        )
    table = F.normalize(known.features.float(), dim=1)
    num_classes = int(known.labels.max()) + 1
    right = 0
    for queries, labels in zip(asked.features.split(BLOCK), asked.labels.split(BLOCK), strict=True):
        cosines, nearest = (F.normalize(queries.float(), dim=1) @ table.T).topk(k)
        votes = torch.zeros(len(queries), num_classes, device=table.device)
        votes.scatter_add_(1, known.labels[nearest], ((cosines - 1) / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(asked.labels)


def linear_accuracy(known: LabelledFeatures, asked: LabelledFeatures) -> float:
    """Share of samples that ridge regression onto one-hot labels puts into the right class.

    Closed form, so nothing has to converge. Features are standardised. The ridge is the one of
    `RIDGES` that is best on every fifth known sample when it is fitted on the others; of equals the
    larger one.
    """
    mean = known.features.double().mean(0)
    std = known.features.double().std(0).clamp(min=1e-6)
    x, tests = ((samples.features.double() - mean) / std for samples in (known, asked))
    num_classes = int(max(known.labels.max(), asked.labels.max())) + 1
    targets = F.one_hot(known.labels, num_classes).double()
    held_out = torch.arange(len(x), device=x.device) % HELD_OUT == 0
    fitted = _ridge_maps(x[~held_out], targets[~held_out])
    scores = [_accuracy(linear, x[held_out], known.labels[held_out]) for linear in fitted]
    best = max(range(len(RIDGES)), key=lambda i: (scores[i], i))
    return _accuracy(_ridge_maps(x, targets)[best], tests, asked.labels)


def _ridge_maps(x: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(weights (D, C), bias (C,)) for each of `RIDGES`; one eigendecomposition serves all."""
    x_mean, bias = x.mean(0), targets.mean(0)
    centered = x - x_mean
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    rotated = vectors.T @ (centered.T @ (targets - bias))
    maps = []
    for ridge in RIDGES:
        weights = vectors @ (rotated / (values.clamp(min=0) + ridge * len(x))[:, None])
        maps.append((weights, bias - x_mean @ weights))
    return maps


def _accuracy(linear: tuple[Tensor, Tensor], x: Tensor, labels: Tensor) -> float:
    weights, bias = linear
    return ((x @ weights + bias).argmax(1) == labels).double().mean().item()
