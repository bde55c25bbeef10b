"""k-means on features, with the search of the quantizers.

Shapes: M features, E their width, K centres.
"""

import torch
from torch import Tensor

from vqrae.tokenizer.quantizers.search import Precision, nearest_codes


@torch.no_grad()
def kmeans(
    features: Tensor,
    num_centers: int,
    iterations: int = 10,
    seed: int = 0,
    precision: Precision = "fp32",
) -> Tensor:
    """Centres (K, E) of features (M, E): Lloyd's algorithm from a random sample.

    Raises:
        ValueError: when there are fewer features than centres.
    """
    if len(features) < num_centers:
        raise ValueError(
            f"got {len(features)} features for {num_centers} codes, expected at least as many"
        )
    generator = torch.Generator(features.device).manual_seed(seed)
    order = torch.randperm(len(features), generator=generator, device=features.device)
    centers = features[order[:num_centers]].clone()
    for _ in range(iterations):
        codes = nearest_codes(features, centers, precision=precision)
        counts = torch.bincount(codes, minlength=num_centers)
        sums = torch.zeros_like(centers).index_add_(0, codes, features)
        errors = (features - centers[codes]).square().sum(-1)
        centers = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty) > 0:
            centers[empty] = features[draw_by_error(errors, len(empty), generator)]
    return centers


def draw_by_error(errors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) with probability proportional to squared errors (M,), as in k-means++.

    Codes go where the table is poor, not where features are many.
    """
    weights = errors + errors.mean() * 1e-3 + torch.finfo(errors.dtype).tiny
    return torch.multinomial(weights, count, replacement=True, generator=generator)
