"""PatchGAN with blurred downsampling, as in MaskBit (arXiv 2409.16211) and TiTok.

Shapes: B batch, H W pixels, S logit map side.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class BlurDownsample(nn.Module):
    """Halve the resolution behind a 4 x 4 binomial filter, so that no aliasing gives a picture away."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = row[:, None] * row / row.sum() ** 2
        self.register_buffer("kernel", kernel.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        kernel = self.kernel.to(hidden.dtype)
        return nn.functional.conv2d(hidden, kernel, stride=2, padding=1, groups=hidden.shape[1])


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> logits (B, 1, S, S), one for each patch.

    Args:
        channels: width of the stem and of every stage, e.g. (128, 128, 256, 512); each stage halves the resolution.
        map_size: largest side of the logit map (adaptive max pooling above it).
    """

    def __init__(self, channels: tuple[int, ...] = (128, 128, 256, 512), map_size: int = 16) -> None:
        super().__init__()
        self.map_size = map_size
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 5, padding=2), nn.LeakyReLU(0.1)]
        for before, after in pairwise(channels):
            groups = min(32, after // 4)
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                BlurDownsample(after),
                nn.GroupNorm(groups, after),
                nn.LeakyReLU(0.1),
            ]
        self.body = nn.Sequential(*layers)
        width = channels[-1]
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 1, 5, padding=2))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(2 * images - 1)
        if hidden.shape[-1] > self.map_size:
            hidden = nn.functional.adaptive_max_pool2d(hidden, self.map_size)
        return self.head(hidden)
