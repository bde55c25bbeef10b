"""Index back-propagation (IBQ, arXiv 2412.02692): the choice itself, so every code, gets gradient.

The code with the largest product z.e is chosen. The backward pass treats the choice as the softmax
over all K products, whose (B N, K) probabilities are recomputed in blocks and never exist at once.

Shapes: B batch, N visual tokens, E codebook width, K codebook size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqrae.tokenizer.quantizers.base import QuantizerOutput
from vqrae.tokenizer.quantizers.search import Precision, best_codes
from vqrae.tokenizer.quantizers.vq import VQ

# Logits of a block of features; the backward pass holds three times as many numbers.
BLOCK_LOGITS = 2**22


class IBQ(VQ):
    """SEED-Voken weighs `index_loss` 1, `commitment_loss` 1, `codebook_loss` 0.25, and optionally
    `entropy_loss`.

    Args:
        entropy_temperature: of the softmax in the entropy term.
    """

    is_nearest = False
    has_entropy = True

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        entropy_temperature: float = 0.01,
        search: Precision = "fp32",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, search=search)
        self.entropy_temperature = entropy_temperature

    def choose(self, features: Tensor, table: Tensor) -> Tensor:
        """Codes (B, N) of the largest product z.e, IBQ's logit."""
        return best_codes(features, table, precision=self.search, exact=not self.training)

    def forward(self, features: Tensor) -> QuantizerOutput:
        output = super().forward(features)
        # In place of the straight-through copy, whose gradient reaches the features alone.
        output.quantized = IndexBackPropagation.apply(features, self.codebook, output.codes)
        output.losses["index_loss"] = (output.quantized - features).square().mean()
        if self.compute_entropy:
            entropy = entropy_loss(features, self.codebook, self.entropy_temperature)
            output.losses["entropy_loss"] = entropy
        return output


class IndexBackPropagation(torch.autograd.Function):
    """Forward: the chosen rows. Backward: that of (p + (one-hot - p).detach()) @ table."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        """Rows (B, N, E) of the table (K, E)."""
        ctx.save_for_backward(features, table, codes)
        return nn.functional.embedding(codes, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        features, table, codes = ctx.saved_tensors
        size = max(1, BLOCK_LOGITS // len(table))
        gradient = gradient.flatten(0, -2)
        blocks = zip(features.flatten(0, -2).split(size), gradient.split(size), strict=True)
        feature_gradients, table_gradient = [], torch.zeros_like(table)
        # The backward pass may run inside the loop's autocast.
        with torch.autocast(features.device.type, enabled=False):
            table_gradient.index_add_(0, codes.flatten(), gradient)
            for block, given in blocks:
                probabilities = (block @ table.T).softmax(-1)
                by_choice = given @ table.T
                by_choice -= (by_choice * probabilities).sum(-1, keepdim=True)
                by_logit = by_choice.mul_(probabilities)
                feature_gradients.append(by_logit @ table)
                table_gradient.addmm_(by_logit.T, block)
        return torch.cat(feature_gradients).view_as(features), table_gradient, None


def entropy_loss(features: Tensor, table: Tensor, temperature: float) -> Tensor:
    """Mean entropy of the features' distributions over codes, minus that of their mean.

    Low when single choices are sure and all codes are in use (as in LFQ, arXiv 2310.05737). The
    mean is over the features (B, N, E) of this process; blocks are recomputed in the backward pass.
    """

    def block_entropy(block: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        logarithms = (block @ table.T / temperature).log_softmax(-1)
        probabilities = logarithms.exp()
        return -(probabilities * logarithms).sum(), probabilities.sum(0)

    flat = features.flatten(0, -2)
    entropies, shares = [], []
    for block in flat.split(max(1, BLOCK_LOGITS // len(table))):
        entropy, share = checkpoint(
            block_entropy, block, table, use_reentrant=False, preserve_rng_state=False
        )
        entropies.append(entropy)
        shares.append(share)
    mean = torch.stack(shares).sum(0) / len(flat)
    # The slope of the logarithm at 0 is infinite, and 0 is frequent.
    mean = mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return torch.stack(entropies).sum() / len(flat) + (mean * mean.log()).sum()
