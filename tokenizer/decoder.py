"""The symmetric decoder: the encoder's own blocks, from code vectors back to pixels, without convolutions.

Shapes: B batch, N = G * G visual tokens on a grid of side G, D feature width, q output patch size.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel


class ViTDecoder(nn.Module):
    """A ViT with patch size 1 over the token grid (VQRAE section 3.2).

    Args:
        encoder: whose block class and configuration the decoder mirrors: depth, width, heads, activation.
        grid_size: G.
        output_patch_size: q; the picture has G * q pixels a side.
    """

    def __init__(self, encoder: PreTrainedModel, grid_size: int, output_patch_size: int) -> None:
        super().__init__()
        self.grid_size, self.output_patch_size = grid_size, output_patch_size
        width = encoder.config.hidden_size
        self.positions = nn.Parameter(torch.zeros(grid_size**2, width))
        self.blocks = type(encoder.encoder)(encoder.config)
        self.norm = nn.LayerNorm(width, eps=encoder.config.layer_norm_eps)
        self.head = nn.Linear(width, 3 * output_patch_size**2)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, N, D) -> pictures (B, 3, G*q, G*q), not clamped."""
        hidden = self.blocks(features + self.positions).last_hidden_state
        patches = self.head(self.norm(hidden))
        q = self.output_patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=self.grid_size, c=3, p=q, q=q)
