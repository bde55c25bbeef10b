"""Plain vector quantization (VQ-VAE, arXiv 1711.00937), started as VQGAN does."""

import torch
from torch import nn
from transformers import initialization as init

from vqrae.tokenizer.quantizers.base import CodebookQuantizer
from vqrae.tokenizer.quantizers.search import Precision


class VQ(CodebookQuantizer):
    """The table is a parameter; only chosen codes get gradient.

    Args:
        codebook_size: K.
        codebook_dim: E.
        search: see `CodebookQuantizer`.
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, *, search: Precision = "fp32"
    ) -> None:
        super().__init__(codebook_size, codebook_dim, search=search)
        self.codebook = nn.Parameter(torch.empty(codebook_size, codebook_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/K, so that all codes are about equally near to any feature."""
        init.uniform_(self.codebook, -1 / self.codebook_size, 1 / self.codebook_size)
