"""SimVQ (arXiv 2411.02038): a frozen codebook C seen through one trained linear map W, so every code gets gradient."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vqrae.tokenizer.quantizers.base import Quantizer, kmeans


class SimVQ(Quantizer):
    """Effective table W(C); C is a buffer, W is a linear layer with bias.

    Args:
        codebook_size: K.
        codebook_dim: E.
        train_codebook: C is a parameter and learns too (the reference reports both ways).
    """

    codebook: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, *, train_codebook: bool = False) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        table = torch.empty(codebook_size, codebook_dim)
        if train_codebook:
            self.codebook = nn.Parameter(table)
        else:
            self.register_buffer("codebook", table)
        self.projection = nn.Linear(codebook_dim, codebook_dim)
        self._cached: tuple[tuple[int, ...], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The reference's start: C ~ N(0, 1/E), W as `nn.Linear` does."""
        init.normal_(self.codebook, std=self.codebook_dim**-0.5)
        self.projection.reset_parameters()

    def table(self) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return self.projection(self.codebook)
        # In evaluation the table is projected once; a change of weights bumps the tensors' versions.
        tensors = (self.codebook, self.projection.weight, self.projection.bias)
        key = tuple(part for tensor in tensors for part in (tensor.data_ptr(), tensor._version))
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self.projection(self.codebook))
        return self._cached[1]

    @torch.no_grad()
    def initialize_from(self, features: Tensor) -> None:
        """C becomes the k-means centres of the features (M, E), W the identity."""
        self.codebook.copy_(kmeans(features, self.codebook_size))
        self.projection.weight.copy_(torch.eye(self.codebook_dim))
        self.projection.bias.zero_()

    @torch.no_grad()
    def revive(self, dead: Tensor, features: Tensor) -> None:
        """Solve W c + b = f, so that the *effective* vectors land on the features."""
        rows = torch.linalg.lstsq(self.projection.weight, (features - self.projection.bias).T).solution.T
        self.codebook[dead] = rows
