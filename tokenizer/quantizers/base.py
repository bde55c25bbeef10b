"""The contract of a quantizer.

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from vqrae.tokenizer.quantizers.search import Precision, nearest_codes


@dataclass
class QuantizerOutput:
    """Attributes:
    quantized: (B, N, E) chosen code vectors; what gradient the features get from them is the quantizer's matter.
    codes: (B, N) int64.
    losses: unweighted, scalars; `codebook_loss` and `commitment_loss` where the quantizer has them.
    """

    quantized: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Features -> codes and their vectors. Outside of training `lookup` gives exactly what `forward` chose.

    All arithmetic is fp32: callers leave autocast before.
    """

    codebook_size: int
    codebook_dim: int
    has_entropy: ClassVar[bool] = False
    """Whether there is an `entropy_loss`."""
    compute_entropy: bool = False
    """Whether `forward` gives it: it costs more than the search."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """The published random start."""

    @abstractmethod
    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize features (B, N, E)."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (B, N, E) of codes (B, N)."""

    def to_code_space(self, features: Tensor) -> Tensor:
        """Features (..., E) as they are compared with code vectors (..., E)."""
        return features

    def after_step(self, taken: Tensor) -> None:
        """Called after every step of the optimizer, on all processes: what is learned without gradients.

        Args:
            taken: bool scalar; False where the step was skipped for a gradient that is not finite.
        """


class CodebookQuantizer(Quantizer):
    """Chooses the nearest row of a table that is learned. A subclass says what the table is and how it starts.

    Args:
        codebook_size: K.
        codebook_dim: E.
        search: precision of the product that finds candidates, `fp32` or `bf16`; the codes are the same.
    """

    codebook: Tensor
    equals_vq: ClassVar[bool] = True
    """Its codes are what `vq` finds with the same table."""

    def __init__(
        self, codebook_size: int, codebook_dim: int, *, search: Precision = "fp32"
    ) -> None:
        super().__init__()
        if search not in get_args(Precision):
            raise ValueError(f"search: got {search!r}, expected one of {get_args(Precision)}")
        self.codebook_size, self.codebook_dim, self.search = codebook_size, codebook_dim, search

    def table(self) -> Tensor:
        """The code vectors (K, E)."""
        return self.codebook

    def nearest(self, features: Tensor, table: Tensor) -> Tensor:
        """Codes (B, N) of features (B, N, E) in code space; squared Euclidean distance (VQRAE Eq. 1)."""
        return nearest_codes(features, table, precision=self.search, settle=not self.training)

    def gather(self, table: Tensor, codes: Tensor) -> Tensor:
        """Rows (B, N, E) of the table, with a gradient for what it is made of."""
        return nn.functional.embedding(codes, table)

    def forward(self, features: Tensor) -> QuantizerOutput:
        features = self.to_code_space(features)
        table = self.table()
        codes = self.nearest(features, table)
        quantized = self.gather(table, codes)
        losses = {  # Eq. 3: the first term moves codes to features, the second features to codes
            "codebook_loss": (quantized - features.detach()).square().mean(),
            "commitment_loss": (quantized.detach() - features).square().mean(),
        }
        if self.training:
            # Outside of training the value is kept exact: x + (q - x) is not q in floating point.
            quantized = features + (quantized - features).detach()
        return QuantizerOutput(quantized, codes, losses)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.gather(self.table(), codes)

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        """Start the table from a sample of features (M, E), M >= K: from their k-means centres."""
        self.codebook.copy_(
            kmeans(self.to_code_space(features), self.codebook_size, precision=self.search)
        )

    @torch.no_grad()
    def revive(self, dead: Tensor, features: Tensor) -> None:
        """Move the code vectors of codes `dead` (R,) onto features (R, E)."""
        self.codebook[dead] = self.to_code_space(features)


@torch.no_grad()
def kmeans(
    features: Tensor,
    num_centers: int,
    iterations: int = 10,
    seed: int = 0,
    precision: Precision = "fp32",
) -> Tensor:
    """Lloyd's algorithm from a random sample; an empty cluster moves onto a badly served feature.

    Args:
        features: (M, E), M >= num_centers.

    Returns:
        Centres (num_centers, E).

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
    """Indices (count,) drawn with probability proportional to squared errors (M,), as k-means++ draws its seeds.

    Codes go where the table is poor, not where features are many. Equal errors of zero are drawn uniformly.
    """
    weights = errors + errors.mean() * 1e-3 + torch.finfo(errors.dtype).tiny
    return torch.multinomial(weights, count, replacement=True, generator=generator)
