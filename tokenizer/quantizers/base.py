"""The contract of a quantizer.

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Rows of features searched at once: bounds the score matrix at SEARCH_ROWS x K (256 MiB at K = 16384) and never N x K.
SEARCH_ROWS = 4096


@dataclass
class QuantizerOutput:
    """Attributes:
    quantized: (B, N, E) chosen code vectors; the gradient passes straight through to the features.
    codes: (B, N) int64.
    losses: unweighted `codebook_loss` and `commitment_loss`, scalars.
    """

    quantized: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module):
    """Features -> nearest code vectors. A subclass says what the table of code vectors is.

    All arithmetic is fp32: callers leave autocast before.
    """

    codebook_size: int
    codebook_dim: int

    def table(self) -> Tensor:
        """The effective code vectors (K, E), differentiable where they are trained."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize features (B, N, E) by squared Euclidean distance (VQRAE Eq. 1)."""
        table = self.table()
        codes = nearest_codes(features, table)
        quantized = nn.functional.embedding(codes, table)
        losses = {  # Eq. 3: the first term moves codes to features, the second features to codes
            "codebook_loss": (quantized - features.detach()).square().mean(),
            "commitment_loss": (quantized.detach() - features).square().mean(),
        }
        if self.training:
            # Outside of training the value is kept exact: x + (q - x) is not q in floating point.
            quantized = features + (quantized - features).detach()
        return QuantizerOutput(quantized, codes, losses)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (B, N, E) of codes (B, N), exactly those that `forward` chose."""
        return nn.functional.embedding(codes, self.table())

    def initialize_from(self, features: Tensor) -> None:
        """Start the table from a sample of features (M, E), M >= K."""
        raise NotImplementedError

    def revive(self, dead: Tensor, features: Tensor) -> None:
        """Move the code vectors of codes `dead` (R,) onto features (R, E)."""
        raise NotImplementedError


@torch.no_grad()
def nearest_codes(features: Tensor, table: Tensor) -> Tensor:
    """Indices (B, N) of the table rows (K, E) nearest to features (B, N, E), searched in blocks of rows.

    argmin |z - e|^2 = argmax (z.e - |e|^2 / 2): one product and one offset, no distances.
    """
    offset = table.square().sum(-1) / 2
    blocks = [(block @ table.T - offset).argmax(-1) for block in features.flatten(0, -2).split(SEARCH_ROWS)]
    return torch.cat(blocks).view(features.shape[:-1])
