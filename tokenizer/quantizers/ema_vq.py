"""VQ whose table follows running means of features, not gradients (VQ-VAE-2, arXiv 1906.00446).

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

import torch
from torch import Tensor
from transformers import initialization as init

from vqrae.common.distributed import sum_over_processes
from vqrae.tokenizer.quantizers.base import CodebookQuantizer, QuantizerOutput
from vqrae.tokenizer.quantizers.search import Precision


class EMAVQ(CodebookQuantizer):
    """Code k is the decayed mean of the features that chose it, `cluster_size` their decayed count.

    An unused code stays where it is until `reinitialize` moves it: the usual ratio of decayed sums
    ends in 0 / 0, or with smoothing at the origin.

    Args:
        decay: share of the old mean that an optimizer step keeps.
    """

    cluster_size: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        decay: float = 0.99,
        search: Precision = "fp32",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, search=search)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected 0 <= decay < 1")
        self.decay = decay
        self.register_buffer("codebook", torch.empty(codebook_size, codebook_dim))
        self.register_buffer("cluster_size", torch.empty(codebook_size))
        self._sums: Tensor | None = (
            None  # (K, E + 1) of the step so far: features, and their number
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1), each code with the weight of one feature."""
        init.normal_(self.codebook)
        init.ones_(self.cluster_size)

    def forward(self, features: Tensor) -> QuantizerOutput:
        codes = self.choose(features, self.codebook)
        quantized = self.lookup(codes)
        if self.training:
            self._collect(features.detach().flatten(0, -2), codes.flatten())
        losses = {"commitment_loss": (quantized.detach() - features).square().mean()}
        return QuantizerOutput(self.straight_through(features, quantized), codes, losses)

    @torch.no_grad()
    def _collect(self, features: Tensor, codes: Tensor) -> None:
        if self._sums is None:
            self._sums = features.new_zeros(self.codebook_size, self.codebook_dim + 1)
        self._sums[:, :-1].index_add_(0, codes, features)
        self._sums[:, -1].index_add_(0, codes, features.new_ones(len(codes)))

    @torch.no_grad()
    def after_step(self, taken: Tensor) -> None:
        """Move the table by what all processes saw since the last step, in one reduction."""
        if self._sums is None:
            return
        sums = sum_over_processes(torch.where(taken, self._sums, 0))
        totals, counts = sums[:, :-1], sums[:, -1]
        kept = torch.where(taken, self.decay, 1) * self.cluster_size
        self.cluster_size.copy_(kept + (1 - self.decay) * counts)
        # (kept e + (1 - decay) sum z) / cluster_size as a step from e: 0 for an unused code.
        share = torch.where(counts > 0, (1 - self.decay) / self.cluster_size, 0)
        self.codebook.add_(share[:, None] * (totals - counts[:, None] * self.codebook))
        self._sums.zero_()

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        super().initialize_from(features)
        self.cluster_size.fill_(1)

    @torch.no_grad()
    def reinitialize(self, codes: Tensor, vectors: Tensor) -> None:
        super().reinitialize(codes, vectors)
        self.cluster_size[codes] = 1
