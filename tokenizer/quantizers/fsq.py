"""Finite scalar quantization (FSQ, arXiv 2309.15505): channels are rounded, nothing is learned.

Shapes: B batch, N visual tokens, E channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import initialization as init

from vqrae.tokenizer.quantizers.base import Quantizer, QuantizerOutput


class FSQ(Quantizer):
    """A code is a number whose digits are the levels of the channels, the first channel the lowest.

    Args:
        codebook_size: K, the product of the levels.
        codebook_dim: E, the number of levels.
        levels: values of each channel, such as [8, 8, 8, 8, 4]; the paper advises at least 5.

    Raises:
        ValueError: when K or E disagree with the levels.
    """

    levels: Tensor
    bases: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, *, levels: Sequence[int]) -> None:
        super().__init__()
        if len(levels) == 0 or min(levels) < 2:
            raise ValueError(f"levels: got {list(levels)}, expected at least 2 for every channel")
        if (codebook_size, codebook_dim) != (math.prod(levels), len(levels)):
            raise ValueError(
                f"levels {list(levels)} make codebook_size={math.prod(levels)} and "
                f"codebook_dim={len(levels)}, got {codebook_size} and {codebook_dim}: set these"
            )
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self._levels = tuple(levels)
        shape = len(levels)
        self.register_buffer("levels", torch.empty(shape, dtype=torch.int64), persistent=False)
        self.register_buffer("bases", torch.empty(shape, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        levels = torch.tensor(self._levels)
        init.copy_(self.levels, levels)
        init.copy_(self.bases, levels.cumprod(0) // levels)

    def to_code_space(self, features: Tensor) -> Tensor:
        """Squash each channel to slightly more than its levels: all are reached, and 0 stays 0."""
        reach = (self.levels - 1) * (1 + 1e-3) / 2
        # An even number of levels is half a step off the centre of tanh.
        off_centre = (self.levels % 2 == 0) / 2
        bounded = torch.tanh(features + torch.atanh(off_centre / reach)) * reach - off_centre
        return bounded / (self.levels // 2)

    def forward(self, features: Tensor) -> QuantizerOutput:
        features = self.to_code_space(features)
        half = self.levels // 2
        # NaN has no digit; it still reaches the losses through the straight-through path.
        digits = (features.detach() * half).nan_to_num().round().long() + half
        codes = (digits * self.bases).sum(-1)
        return QuantizerOutput(self.straight_through(features, self.lookup(codes)), codes, {})

    def lookup(self, codes: Tensor) -> Tensor:
        half = self.levels // 2
        return (codes[..., None] // self.bases % self.levels - half) / half

    def code_vectors(self) -> Tensor:
        return self.lookup(torch.arange(self.codebook_size, device=self.levels.device))
