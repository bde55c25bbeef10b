"""What quantizers share that have n codebooks: a token has n codes, each one of K."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from vqrae.tokenizer.quantizers.base import CodebookQuantizer
from vqrae.tokenizer.quantizers.search import Precision


class SeveralCodebooks(CodebookQuantizer):
    """Learned tables (n, K, w) of code vectors of width w.

    Args:
        num_codebooks: n.
    """

    has_several_codebooks: ClassVar[bool] = True

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        *,
        search: Precision = "fp32",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, search=search)
        self.num_codebooks = num_codebooks
        shape = (num_codebooks, codebook_size, self.vector_dim)
        self.codebook = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @property
    def vector_dim(self) -> int:
        """w, the width of a code vector."""
        return self.codebook_dim

    def code_vectors(self) -> Tensor:
        table_nKw = self.table()
        return table_nKw[0] if self.num_codebooks == 1 else table_nKw

    def join(self, codes: Tensor) -> Tensor:
        """Codes (..., n) as this quantizer gives them: (...) of one codebook."""
        return codes.squeeze(-1) if self.num_codebooks == 1 else codes

    def separate(self, codes: Tensor) -> Tensor:
        """Codes as this quantizer gives them -> (..., n)."""
        return codes.unsqueeze(-1) if self.num_codebooks == 1 else codes
