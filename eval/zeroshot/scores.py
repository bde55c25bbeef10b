"""Classification and retrieval by cosines, as CLIP does it (arXiv 2103.00020).

Embeddings have length 1. Shapes: C classes, T prompts of each, M queries, K keys, P width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024  # queries that are compared at once


def class_vectors(prompts: Tensor) -> Tensor:
    """Prompts (C, T, P) -> the direction of each class (C, P): the mean, again of length 1."""
    return F.normalize(prompts.mean(1), dim=-1)


def ranks(queries: Tensor, keys: Tensor, right: Tensor) -> Tensor:
    """How many wrong keys come before the first right one: (M,), 0 for a query that finds its own.

    Keys come in the order of their cosine, equal ones in their own order.

    Args:
        queries, keys: (M, P), (K, P).
        right: bool (M, K), at least one in every row.
    """
    places_K = torch.arange(len(keys), device=keys.device)
    found = []
    for part_MP, right_MK in zip(queries.split(CHUNK), right.split(CHUNK), strict=True):
        scores_MK = part_MP @ keys.T
        best_M1, place_M1 = scores_MK.masked_fill(~right_MK, -torch.inf).max(1, keepdim=True)
        before_MK = (scores_MK > best_M1) | ((scores_MK == best_M1) & (places_K < place_M1))
        found.append((before_MK & ~right_MK).sum(1))
    return torch.cat(found)


def recalls(ranks: Tensor, prefix: str, *limits: int) -> dict[str, float]:
    """Share of queries whose right key is among the first 1, 5, …, by `PREFIX1`, `PREFIX5`, …"""
    return {f"{prefix}{limit}": (ranks < limit).double().mean().item() for limit in limits}
