"""The contract of a quantizer.

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Rows of features searched at once: bounds the score matrix at SEARCH_ROWS x K (256 MiB at K = 16384) and never N x K.
SEARCH_ROWS = 4096


@dataclass
class QuantizerOutput:
    """Attributes:
    quantized: (B, N, E) chosen code vectors; the gradient passes straight through to the features.
    codes: (B, N) int64.
    losses: unweighted `codebook_loss` and `commitment_loss`, scalars.
    """

    quantized: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Features -> nearest code vectors. A subclass says what the table of code vectors is.

    All arithmetic is fp32: callers leave autocast before.
    """

    codebook_size: int
    codebook_dim: int

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the table's random start."""

    @abstractmethod
    def table(self) -> Tensor:
        """The effective code vectors (K, E), differentiable where they are trained."""

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize features (B, N, E) by squared Euclidean distance (VQRAE Eq. 1)."""
        table = self.table()
        codes = nearest_codes(features, table)
        quantized = nn.functional.embedding(codes, table)
        losses = {  # Eq. 3: the first term moves codes to features, the second features to codes
            "codebook_loss": (quantized - features.detach()).square().mean(),
            "commitment_loss": (quantized.detach() - features).square().mean(),
        }
        if self.training:
            # Outside of training the value is kept exact: x + (q - x) is not q in floating point.
            quantized = features + (quantized - features).detach()
        return QuantizerOutput(quantized, codes, losses)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (B, N, E) of codes (B, N), exactly those that `forward` chose."""
        return nn.functional.embedding(codes, self.table())

    @abstractmethod
    def initialize_from(self, features: Tensor) -> None:
        """Start the table from a sample of features (M, E), M >= K."""

    @abstractmethod
    def revive(self, dead: Tensor, features: Tensor) -> None:
        """Move the code vectors of codes `dead` (R,) onto features (R, E)."""


@torch.no_grad()
def nearest_codes(features: Tensor, table: Tensor) -> Tensor:
    """Indices (B, N) of the table rows (K, E) nearest to features (B, N, E), searched in blocks of rows.

    argmin |z - e|^2 = argmax (z.e - |e|^2 / 2): one product and one offset, no distances.
    """
    offset = table.square().sum(-1) / 2
    blocks = [(block @ table.T - offset).argmax(-1) for block in features.flatten(0, -2).split(SEARCH_ROWS)]
    return torch.cat(blocks).view(features.shape[:-1])


@torch.no_grad()
def kmeans(features: Tensor, num_centers: int, iterations: int = 10, seed: int = 0) -> Tensor:
    """Lloyd's algorithm from a random sample; an empty cluster moves onto a badly served feature.

    Args:
        features: (M, E), M >= num_centers.

    Returns:
        Centres (num_centers, E).

    Raises:
        ValueError: when there are fewer features than centres.
    """
    if len(features) < num_centers:
        raise ValueError(f"got {len(features)} features for {num_centers} codes, expected at least as many")
    generator = torch.Generator(features.device).manual_seed(seed)
    order = torch.randperm(len(features), generator=generator, device=features.device)
    centers = features[order[:num_centers]].clone()
    for _ in range(iterations):
        codes = nearest_codes(features, centers)
        counts = torch.bincount(codes, minlength=num_centers)
        sums = torch.zeros_like(centers).index_add_(0, codes, features)
        errors = (features - centers[codes]).square().sum(-1)
        centers = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty) > 0:
            centers[empty] = features[draw_by_error(errors, len(empty), generator)]
    return centers


def draw_by_error(errors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) drawn with probability proportional to squared errors (M,), as k-means++ draws its seeds.

    Codes go where the table is poor, not where features are many. Equal errors of zero are drawn uniformly.
    """
    weights = errors + errors.mean() * 1e-3 + torch.finfo(errors.dtype).tiny
    return torch.multinomial(weights, count, replacement=True, generator=generator)
