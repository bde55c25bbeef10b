"""SimVQ (arXiv 2411.02038): a frozen codebook seen through one trained linear map.

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vqrae.common.distributed import FullPrecisionLinear
from vqrae.tokenizer.quantizers.base import CodebookQuantizer, QuantizerOutput
from vqrae.tokenizer.quantizers.projection import ProjectedRows, ProjectedTable
from vqrae.tokenizer.quantizers.rates import CodeRates
from vqrae.tokenizer.quantizers.search import Precision


class SimVQ(CodebookQuantizer):
    """The code vectors are W c_k: the codebook C is a buffer, W a linear layer with bias.

    Args:
        train_codebook: C is a parameter and learns too (the reference reports both ways).
        rate_weight: makes rare codes cost more, see `CodeRates`; 0: the nearest code.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        train_codebook: bool = False,
        rate_weight: float = 0.0,
        search: Precision = "fp32",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, search=search)
        codebook_KE = torch.empty(codebook_size, codebook_dim)
        if train_codebook:
            self.codebook = nn.Parameter(codebook_KE)
        else:
            self.register_buffer("codebook", codebook_KE)
        self.projection = FullPrecisionLinear(codebook_dim, codebook_dim)  # W
        self.projected = ProjectedTable()
        self.rates = CodeRates(codebook_size, rate_weight) if rate_weight else None
        self.reset_parameters()

    def forward(self, features_BNE: Tensor) -> QuantizerOutput:
        table_KE = self.table()
        # k* = argmin_k |z - W c_k|^2 (VQRAE Eq. 1), plus the code's price where there are rates
        codes_BN = self.choose(features_BNE, table_KE)
        if self.rates is not None and self.training:
            self.rates.collect(features_BNE.flatten(0, 1), codes_BN.flatten())
        # q = W c_k*; the gradient of W goes through the chosen rows alone
        quantized_BNE = ProjectedRows.apply(
            table_KE, codes_BN, self.codebook, self.projection.weight, self.projection.bias
        )
        losses = {  # VQRAE Eq. 3: |q - sg(z)|^2 moves W, |sg(q) - z|^2 moves the features
            "codebook_loss": (quantized_BNE - features_BNE.detach()).square().mean(),
            "commitment_loss": (quantized_BNE.detach() - features_BNE).square().mean(),
        }
        quantized_BNE = self.straight_through(features_BNE, quantized_BNE)
        return QuantizerOutput(quantized_BNE, codes_BN, losses)

    def prices(self) -> Tensor | None:
        return None if self.rates is None else self.rates.prices()

    def after_step(self, taken: Tensor) -> None:
        if self.rates is not None:
            self.rates.after_step(taken)

    def table(self) -> Tensor:
        """W(C) (K, E), without gradient."""
        reuse = not (self.training or torch.is_grad_enabled())
        return self.projected(self.codebook, self.projection, reuse=reuse)

    def train(self, mode: bool = True) -> "SimVQ":
        self.projected.clear()
        return super().train(mode)

    def reset_parameters(self) -> None:
        """The reference's start: C ~ N(0, 1/E), W as `nn.Linear` does."""
        init.normal_(self.codebook, std=self.codebook_dim**-0.5)
        self.projection.reset_parameters()

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        """C becomes the k-means centres of the features (M, E), W the identity."""
        super().initialize_from(features)
        self.projection.weight.copy_(torch.eye(self.codebook_dim))
        self.projection.bias.zero_()
        if self.rates is not None:
            self.rates.restart()

    @torch.no_grad()
    def reinitialize(self, codes: Tensor, vectors: Tensor) -> None:
        """Solve W c + b = z, so that the projected vectors, not c, are those given."""
        shifted = (vectors - self.projection.bias).T
        self.codebook[codes] = torch.linalg.lstsq(self.projection.weight, shifted).solution.T
        if self.rates is not None:
            self.rates.shares[codes] = 1 / self.codebook_size
