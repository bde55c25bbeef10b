"""The projected table of SimVQ, T = C W' + b: cached in evaluation, with a cheap backward pass.

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqrae.tokenizer.quantizers.search import exact_products


class ProjectedTable:
    """T (K, E) without gradient, kept while the weights that it is made of stay as they are."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Compute the table again when it is next asked for."""
        self._key: tuple[int, ...] = ()
        self._table: Tensor | None = None

    @torch.no_grad()
    @exact_products()  # decoded without TF32 as trained with it
    def __call__(self, codebook: Tensor, projection: nn.Linear, *, reuse: bool) -> Tensor:
        """The table.

        Args:
            reuse: keep it, and take the one that was kept. Not in training: a fused optimizer, or
                an engine with views of the weights, changes them without changing their versions.
        """
        if not reuse:
            self.clear()
            return projection(codebook)
        key: tuple[int, ...] = ()
        for tensor in (codebook, projection.weight, projection.bias):
            key += (tensor.data_ptr(), tensor._version)
        if self._table is None or self._key != key:
            self._key = key
            self._table = projection(codebook)
        return self._table


class ProjectedRows(torch.autograd.Function):
    """Rows of T with the gradients of C, W and b.

    The values are those of T, so they equal a lookup bit for bit. The backward pass multiplies the
    chosen rows alone, where autograd would multiply all K.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, codes: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Rows (B, N, E) of the table (K, E) for codes (B, N)."""
        ctx.save_for_backward(codes, codebook, weight)
        return nn.functional.embedding(codes, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, Tensor, Tensor]:
        codes, codebook, weight = ctx.saved_tensors
        codes, gradient = codes.flatten(), gradient.flatten(0, -2)
        by_bias = gradient.sum(0)
        by_codebook = None
        # The backward pass may run inside the loop's autocast.
        with torch.autocast(gradient.device.type, enabled=False):
            if len(codes) > len(codebook) or ctx.needs_input_grad[2]:
                gradient = torch.zeros_like(codebook).index_add_(0, codes, gradient)
                rows = codebook
            else:
                rows = codebook[codes]
            if ctx.needs_input_grad[2]:
                by_codebook = gradient @ weight
            return None, None, by_codebook, gradient.T @ rows, by_bias
