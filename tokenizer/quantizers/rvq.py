"""Residual quantization (RQ-VAE, arXiv 2203.01941): each code says what those before it left over.

RQ-VAE shares one codebook among all depths. Here each depth has its own, as each part of `mcq` has,
so that both have as many vectors for the same bits.

Shapes: B batch, N visual tokens, E width, n depths with K codes each, M features of a sample.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vqrae.tokenizer.quantizers.base import QuantizerOutput
from vqrae.tokenizer.quantizers.kmeans import kmeans
from vqrae.tokenizer.quantizers.several import SeveralCodebooks


class RVQ(SeveralCodebooks):
    """The quantized vector is the sum of n code vectors, each the nearest to what is left."""

    def reset_parameters(self) -> None:
        """As plain VQ starts."""
        init.uniform_(self.codebook, -1 / self.codebook_size, 1 / self.codebook_size)

    def forward(self, features: Tensor) -> QuantizerOutput:
        left_BNE = features
        codes: list[Tensor] = []
        codebook_losses, commitment_losses = [], []
        for table_KE in self.codebook:
            codes_BN = self.choose(left_BNE, table_KE)
            chosen_BNE = nn.functional.embedding(codes_BN, table_KE)
            # Each depth learns from what reaches it; the value is that of all depths up to it.
            codebook_losses.append((chosen_BNE - left_BNE.detach()).square().mean())
            left_BNE = left_BNE - chosen_BNE.detach()
            commitment_losses.append(left_BNE.square().mean())
            codes.append(codes_BN)
        joined = self.join(torch.stack(codes, dim=-1))
        losses = {
            "codebook_loss": torch.stack(codebook_losses).mean(),
            "commitment_loss": torch.stack(commitment_losses).mean(),
        }
        quantized_BNE = self.straight_through(features, self.lookup(joined))
        return QuantizerOutput(quantized_BNE, joined, losses)

    def rows(self, codes: Tensor, table: Tensor) -> Tensor:
        quantized, *others = self._chosen(codes, table)
        for chosen in others:
            quantized = quantized + chosen
        return quantized

    def targets(self, features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        left, errors = [features], []
        for chosen_ME in self._chosen(codes, self.codebook):
            left.append(left[-1] - chosen_ME)
            errors.append(left[-1].square().sum(-1))
        return torch.stack(left[:-1]), torch.stack(errors)

    def _chosen(self, codes: Tensor, table: Tensor) -> list[Tensor]:
        """Of each depth the code vectors (..., E)."""
        by_depth = zip(self.separate(codes).unbind(-1), table, strict=True)
        return [nn.functional.embedding(codes, table_KE) for codes, table_KE in by_depth]

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        """Each depth from the k-means centres of what the depths before it leave over."""
        for table_KE in self.codebook:
            table_KE.copy_(kmeans(features, self.codebook_size, precision=self.search))
            features = features - table_KE[self.choose(features, table_KE)]
