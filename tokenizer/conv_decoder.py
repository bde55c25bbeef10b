"""UniTok's decoder (arXiv 2502.20321): ViTamin mirrored, blocks first, then convolutions upwards.

Shapes: B batch, N = G * G visual tokens, D feature width, C channels, H W pixels.
"""

import math

from einops import rearrange
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vqrae.tokenizer.vitamin import ViTaminConfig, ViTaminEncoder


class ConvDecoder(nn.Module):
    """Features (B, N, D) of a square grid of any size -> normalised pixels (B, 3, H, W).

    Args:
        config: of the encoder that it mirrors: widths, depths, activation, drop path.
    """

    def __init__(self, config: ViTaminConfig) -> None:
        super().__init__()
        (low, high), (low_depth, high_depth) = config.stem_widths, config.stem_depths
        self.blocks = ViTaminEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_conv1 = Upsample(config.hidden_size, high)
        self.up_conv2 = up_stage(high, high, high_depth)
        self.up_conv3 = up_stage(high, low, low_depth)
        # Mirrors the encoder's first convolution, which keeps the resolution for patches of 8.
        self.up_conv4 = Upsample(low, low, scale=config.patch_size // 8)
        self.head_norm = LayerNorm2d(low, eps=config.layer_norm_eps)
        self.head = nn.Conv2d(low, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        hidden_BND = self.norm(self.blocks(features).last_hidden_state)
        side = math.isqrt(hidden_BND.shape[1])
        hidden_BCHW = rearrange(hidden_BND, "b (h w) d -> b d h w", h=side)
        hidden_BCHW = self.up_conv3(self.up_conv2(self.up_conv1(hidden_BCHW)))
        return self.head(F.gelu(self.head_norm(self.up_conv4(hidden_BCHW))))


class UpBlock(GradientCheckpointingLayer):
    """timm's `MbConvLNBlock`, an inverted bottleneck four times as wide inside, upwards.

    Args:
        double: double the resolution by full convolutions, inside and in the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, *, double: bool) -> None:
        super().__init__()
        inner = 4 * out_channels
        self.pre_norm = LayerNorm2d(in_channels, eps=1e-6)
        self.conv1_1x1 = nn.Conv2d(in_channels, inner, 1)
        self.up = Upsample(inner, inner) if double else nn.Identity()
        self.conv2_kxk = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.conv3_1x1 = nn.Conv2d(inner, out_channels, 1)
        self.shortcut = Upsample(in_channels, out_channels) if double else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.up(F.gelu(self.conv1_1x1(self.pre_norm(hidden))))
        return self.conv3_1x1(F.gelu(self.conv2_kxk(inner))) + self.shortcut(hidden)


def up_stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """Blocks of which the first doubles the resolution."""
    later = [UpBlock(out_channels, out_channels, double=False) for _ in range(depth - 1)]
    return nn.Sequential(UpBlock(in_channels, out_channels, double=True), *later)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C', scale * H, scale * W): repeat the pixels, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=self.scale))
