"""The contract of a quantizer, and what all quantizers with a table of code vectors share.

Shapes: B batch, N visual tokens, E codebook width, K codebook size, n codebooks, M features of a
sample. Codes are (B, N) of one codebook, (B, N, n) of several.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from vqrae.tokenizer.quantizers.kmeans import kmeans
from vqrae.tokenizer.quantizers.search import Precision, nearest_codes


@dataclass
class QuantizerOutput:
    """Attributes:
    quantized: (B, N, E) chosen code vectors; in training with a gradient for the features.
    codes: (B, N) or (B, N, n), int64.
    losses: unweighted scalars; `codebook_loss` and `commitment_loss` where the quantizer has them.
    """

    quantized: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Features -> codes and their vectors. In evaluation `lookup` gives exactly `forward`'s.

    All arithmetic is fp32: callers leave autocast first.
    """

    codebook_size: int
    codebook_dim: int
    num_codebooks: int = 1
    has_several_codebooks: ClassVar[bool] = False
    """Whether its class takes a number of codebooks, as its third argument."""
    has_entropy: ClassVar[bool] = False
    """Whether there is an `entropy_loss`."""
    compute_entropy: bool = False
    """Whether `forward` computes it: it costs more than the search."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """The published random start."""

    @abstractmethod
    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize features (B, N, E)."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (B, N, E) of codes (B, N) or (B, N, n)."""

    @abstractmethod
    def code_vectors(self) -> Tensor:
        """The vectors of all codes (K, E), or (n, K, …) of several codebooks."""

    def to_code_space(self, features: Tensor) -> Tensor:
        """Features (..., E) as they are compared with code vectors (..., E)."""
        return features

    def targets(self, features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What each codebook was to express of features (M, E) with these codes.

        Returns:
            Vectors of the code space (n, M, w), and their squared errors (n, M).
        """
        vectors = self.to_code_space(features)[None]
        return vectors, (vectors - self.lookup(codes)).square().sum(-1)

    def straight_through(self, features: Tensor, quantized: Tensor) -> Tensor:
        """The code vectors, whose gradient is passed on to the features (VQ-VAE, 1711.00937)."""
        # Exact in evaluation: z + (e - z) is not e in floating point.
        return features + (quantized - features).detach() if self.training else quantized

    def after_step(self, taken: Tensor) -> None:
        """Update what is learned without gradients, after an optimizer step, on all processes.

        Args:
            taken: bool scalar; False when the step was skipped because its gradient was not finite.
        """


class CodebookQuantizer(Quantizer):
    """Chooses a row of a learned table. A subclass says what the table is and how it starts.

    Args:
        codebook_size: K.
        codebook_dim: E.
        search: `fp32` or `bf16`, of the product that finds candidates; the codes are the same.
    """

    codebook: Tensor
    is_nearest: ClassVar[bool] = True
    """Whether the code is the nearest row by Euclidean distance to the feature as it is."""

    def __init__(
        self, codebook_size: int, codebook_dim: int, *, search: Precision = "fp32"
    ) -> None:
        super().__init__()
        if search not in get_args(Precision):
            raise ValueError(f"search: got {search!r}, expected one of {get_args(Precision)}")
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.search = search

    def table(self) -> Tensor:
        """The code vectors (K, E), or (n, K, w) of several codebooks."""
        return self.codebook

    def code_vectors(self) -> Tensor:
        return self.table()

    def prices(self) -> Tensor | None:
        """What each code (K,) adds to its squared distance, float64; None: nothing."""
        return None

    def choose(self, features: Tensor, table: Tensor) -> Tensor:
        """Codes of features (B, N, E) in code space."""
        # Training skips exact tie-breaking, which makes the host wait for the device.
        exact = not self.training
        return nearest_codes(features, table, self.prices(), precision=self.search, exact=exact)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.rows(codes, self.table())

    def rows(self, codes: Tensor, table: Tensor) -> Tensor:
        """What codes stand for in a table: (B, N, E)."""
        return nn.functional.embedding(codes, table)

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        """Start each table from the k-means centres of features (M, E), M >= K."""
        features = self.to_code_space(features)
        self.codebook.copy_(kmeans(features, self.codebook_size, precision=self.search))

    @torch.no_grad()
    def reinitialize(self, codes: Tensor, vectors: Tensor) -> None:
        """Move the code vectors of `codes` (R,) onto vectors (R, w) of the code space.

        Args:
            codes: counted through all codebooks: code k of codebook i is i K + k.
        """
        self.codebook.view(-1, self.codebook.shape[-1])[codes] = vectors
