"""Entropy-constrained quantization (Chou, Lookabaugh and Gray, 1989): rare codes cost more.

The nearest code makes codes hard to predict: equal patches in different surroundings have different
codes, which hardly differ in what is decoded, and a generator must learn which is which. With rates
a code k costs |z - e_k|^2 - lambda log p_k, where lambda is `weight` times the variance of features
and p_k the code's share of them: of two codes that are about as near, the common one is taken.

Shapes: M features, E width, K codes.
"""

import torch
from torch import Tensor, nn

from vqrae.common.distributed import sum_over_processes

SMALLEST_SHARE = 1e-5  # of a code that nothing chose: its price stays finite


class CodeRates(nn.Module):
    """Running shares of the codes and the running variance of features, saved with the model.

    Args:
        codebook_size: K.
        weight: of the rate, in variances of the features for each nat.
        decay: share of the old means that an optimizer step keeps.
    """

    shares: Tensor
    variance: Tensor

    def __init__(self, codebook_size: int, weight: float, *, decay: float = 0.98) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"rate_weight: got {weight}, expected a number >= 0")
        self.weight, self.decay = weight, decay
        self.register_buffer("shares", torch.full((codebook_size,), 1 / codebook_size))
        self.register_buffer("variance", torch.zeros(1))
        self._sums: Tensor | None = None  # (K + E + 1) of the step so far

    def prices(self) -> Tensor:
        """What each code (K,) adds to its squared distance, float64."""
        rates_K = -self.shares.double().clamp(min=SMALLEST_SHARE).log()
        return self.weight * self.variance.double() * rates_K

    def restart(self) -> None:
        """Forget everything: equal shares, and distances alone until the next step."""
        self.shares.fill_(1 / len(self.shares))
        self.variance.zero_()

    @torch.no_grad()
    def collect(self, features: Tensor, codes: Tensor) -> None:
        """Count the codes (M,) of features (M, E) until the optimizer step is over."""
        counts_K = torch.zeros_like(self.shares).index_add_(0, codes, features.new_ones(len(codes)))
        parts = [counts_K, features.sum(0), features.square().sum()[None]]
        sums = torch.cat(parts)
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def after_step(self, taken: Tensor) -> None:
        """Move the means by what all processes saw since the last step, in one reduction."""
        if self._sums is None:
            return
        sums = sum_over_processes(self._sums)
        self._sums = None
        counts_K, totals_E = sums[: len(self.shares)], sums[len(self.shares) : -1]
        count = counts_K.sum()
        variance = sums[-1:] / count - (totals_E / count).square().sum()
        # The first variance is taken as it is.
        weight = torch.where(self.variance == 0, 1, 1 - self.decay)
        new = {"variance": self.variance.lerp(variance, weight)}
        new["shares"] = self.shares.lerp(counts_K / count, 1 - self.decay)
        for name, value in new.items():
            buffer = self.get_buffer(name)
            buffer.copy_(torch.where(taken, value, buffer))  # a skipped step may hold NaN
