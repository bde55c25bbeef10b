"""Multi-codebook quantization (UniTok, arXiv 2502.20321, section 3.3).

A feature is cut into n parts, each with a codebook of its own. n codebooks of K codes have K^n
different tokens, where one of n K codes has n K.

Shapes: B batch, N visual tokens, E width, n codebooks of K codes, w = E / n the width of a part,
M features of a sample.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vqrae.tokenizer.quantizers.base import QuantizerOutput
from vqrae.tokenizer.quantizers.kmeans import kmeans
from vqrae.tokenizer.quantizers.search import best_codes
from vqrae.tokenizer.quantizers.several import SeveralCodebooks


class MCQ(SeveralCodebooks):
    """Parts of features and code vectors are normalised; the code has the largest cosine."""

    is_nearest = False

    @property
    def vector_dim(self) -> int:
        """w = E / n.

        Raises:
            ValueError: when E is not a multiple of n.
        """
        if self.codebook_dim % self.num_codebooks:
            raise ValueError(
                f"codebook_dim: got {self.codebook_dim} for num_codebooks={self.num_codebooks}, "
                "expected a multiple of it"
            )
        return self.codebook_dim // self.num_codebooks

    def reset_parameters(self) -> None:
        """UniTok's start: short vectors, which the first steps turn far."""
        bound = self.vector_dim**-0.5 / 36
        init.uniform_(self.codebook, -bound, bound)

    def forward(self, features: Tensor) -> QuantizerOutput:
        z_BNE = self.to_code_space(features)
        table_nKw = self.table()
        codes = self.choose(z_BNE, table_nKw)
        chosen_BNE = self.rows(codes, table_nKw)
        losses = {
            "codebook_loss": (chosen_BNE - z_BNE.detach()).square().mean(),
            "commitment_loss": (chosen_BNE.detach() - z_BNE).square().mean(),
        }
        return QuantizerOutput(self.straight_through(z_BNE, chosen_BNE), codes, losses)

    def table(self) -> Tensor:
        return nn.functional.normalize(self.codebook, dim=-1)

    def to_code_space(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(self.cut(features), dim=-1).flatten(-2)

    def cut(self, features: Tensor) -> Tensor:
        """Features (..., E) -> their parts (..., n, w)."""
        return features.unflatten(-1, (self.num_codebooks, -1))

    def choose(self, features: Tensor, table: Tensor) -> Tensor:
        exact = not self.training
        parts = self.cut(features)
        return self.join(best_codes(parts, table, precision=self.search, exact=exact))

    def rows(self, codes: Tensor, table: Tensor) -> Tensor:
        # One lookup in all tables as one, in which code k of table i is i K + k.
        firsts = self.codebook_size * torch.arange(self.num_codebooks, device=codes.device)
        numbers = self.separate(codes) + firsts
        return nn.functional.embedding(numbers, table.flatten(0, 1)).flatten(-2)

    def targets(self, features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        z_nMw = self.cut(self.to_code_space(features)).transpose(0, 1)
        chosen_nMw = self.cut(self.lookup(codes)).transpose(0, 1)
        return z_nMw, (z_nMw - chosen_nMw).square().sum(-1)

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        parts = self.cut(self.to_code_space(features)).unbind(1)
        for table_Kw, part_Mw in zip(self.codebook, parts, strict=True):
            table_Kw.copy_(kmeans(part_Mw, self.codebook_size, precision=self.search))
