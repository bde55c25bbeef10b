"""SimVQ (arXiv 2411.02038): a frozen codebook C seen through one trained linear map W, so every code gets gradient."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vqrae.common.distributed import FullPrecisionLinear
from vqrae.tokenizer.quantizers.base import CodebookQuantizer
from vqrae.tokenizer.quantizers.search import Precision, exact_products


class SimVQ(CodebookQuantizer):
    """Effective table W(C); C is a buffer, W is a linear layer with bias.

    Args:
        codebook_size: K.
        codebook_dim: E.
        train_codebook: C is a parameter and learns too (the reference reports both ways).
        search: see `CodebookQuantizer`.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        train_codebook: bool = False,
        search: Precision = "fp32",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, search=search)
        table = torch.empty(codebook_size, codebook_dim)
        if train_codebook:
            self.codebook = nn.Parameter(table)
        else:
            self.register_buffer("codebook", table)
        self.projection = FullPrecisionLinear(codebook_dim, codebook_dim)
        self._cached: tuple[tuple[int, ...], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The reference's start: C ~ N(0, 1/E), W as `nn.Linear` does."""
        init.normal_(self.codebook, std=self.codebook_dim**-0.5)
        self.projection.reset_parameters()

    @exact_products()  # as trained with TF32, so decoded without
    def table(self) -> Tensor:
        """W(C) without gradient, which `gather` has; projected once in evaluation."""
        if self.training or torch.is_grad_enabled():
            self._cached = None  # a fused optimizer, or an engine with views of the weights, leaves their versions as they are
            with torch.no_grad():
                return self.projection(self.codebook)
        tensors = (self.codebook, self.projection.weight, self.projection.bias)
        key = tuple(part for tensor in tensors for part in (tensor.data_ptr(), tensor._version))
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self.projection(self.codebook))
        return self._cached[1]

    def train(self, mode: bool = True) -> "SimVQ":
        self._cached = None
        return super().train(mode)

    def gather(self, table: Tensor, codes: Tensor) -> Tensor:
        return ProjectedRows.apply(
            table, codes, self.codebook, self.projection.weight, self.projection.bias
        )

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        """C becomes the k-means centres of the features (M, E), W the identity."""
        super().initialize_from(features)
        self.projection.weight.copy_(torch.eye(self.codebook_dim))
        self.projection.bias.zero_()

    @torch.no_grad()
    def revive(self, dead: Tensor, features: Tensor) -> None:
        """Solve W c + b = f, so that the *effective* vectors land on the features."""
        rows = torch.linalg.lstsq(
            self.projection.weight, (features - self.projection.bias).T
        ).solution.T
        self.codebook[dead] = rows


class ProjectedRows(torch.autograd.Function):
    """Rows of the projected table T = C W^T + b, with the gradients of C, W and b.

    The values are T's own, so they equal a lookup bit for bit. Backward only the chosen rows are multiplied, where autograd
    would multiply all K.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, codes: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Rows (B, N, E)."""
        ctx.save_for_backward(codes, codebook, weight)
        return nn.functional.embedding(codes, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, Tensor, Tensor]:
        codes, codebook, weight = ctx.saved_tensors
        codes, gradient = codes.flatten(), gradient.flatten(0, -2)
        by_bias = gradient.sum(0)
        by_codebook = None
        with torch.autocast(
            gradient.device.type, enabled=False
        ):  # backward may run inside of the loop's autocast
            if len(codes) > len(codebook) or ctx.needs_input_grad[2]:
                gradient = torch.zeros_like(codebook).index_add_(0, codes, gradient)
                rows = codebook
            else:
                rows = codebook[codes]
            if ctx.needs_input_grad[2]:
                by_codebook = gradient @ weight
            return None, None, by_codebook, gradient.T @ rows, by_bias
