"""Vector quantization (VQ-VAE, arXiv 1711.00937), plain and on the unit sphere (ViT-VQGAN).

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vqrae.tokenizer.quantizers.base import CodebookQuantizer, QuantizerOutput
from vqrae.tokenizer.quantizers.search import Precision


class VQ(CodebookQuantizer):
    """The table is a parameter; only chosen codes get gradient."""

    def __init__(
        self, codebook_size: int, codebook_dim: int, *, search: Precision = "fp32"
    ) -> None:
        super().__init__(codebook_size, codebook_dim, search=search)
        self.codebook = nn.Parameter(torch.empty(codebook_size, codebook_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/K as in VQGAN: any feature is about equally near to all codes."""
        init.uniform_(self.codebook, -1 / self.codebook_size, 1 / self.codebook_size)

    def forward(self, features: Tensor) -> QuantizerOutput:
        z_BNE = self.to_code_space(features)
        table_KE = self.table()
        codes_BN = self.choose(z_BNE, table_KE)
        chosen_BNE = nn.functional.embedding(codes_BN, table_KE)
        losses = {
            "codebook_loss": (chosen_BNE - z_BNE.detach()).square().mean(),
            "commitment_loss": (chosen_BNE.detach() - z_BNE).square().mean(),
        }
        return QuantizerOutput(self.straight_through(z_BNE, chosen_BNE), codes_BN, losses)


class L2VQ(VQ):
    """ViT-VQGAN (arXiv 2110.04627), LlamaGen: features, table and what the decoder gets are
    normalised, so the nearest code has the largest cosine."""

    is_nearest = False

    def table(self) -> Tensor:
        return self.to_code_space(self.codebook)

    def to_code_space(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=-1)
