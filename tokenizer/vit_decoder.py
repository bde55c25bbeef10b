"""The symmetric decoder of VQRAE: the encoder's blocks, from visual tokens to pixels.

Shapes: B batch, N = G * G visual tokens, D feature width, q output patch size.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init


class ViTDecoder(nn.Module):
    """A ViT with patch size 1 over the token grid, without convolutions.

    Args:
        encoder: whose blocks the decoder mirrors: depth, width, heads, activation.
        grid_size: G.
        output_patch_size: q; the image has G * q pixels a side.
        output_basis: the head's outputs are `pixels`, or coefficients of cosines (`dct`).
    """

    def __init__(
        self, encoder: PreTrainedModel, grid_size: int, output_patch_size: int, output_basis: str
    ) -> None:
        super().__init__()
        self.grid_size, self.output_patch_size = grid_size, output_patch_size
        width = encoder.config.hidden_size
        self.positions = nn.Parameter(torch.zeros(grid_size**2, width))
        self.blocks = type(encoder.encoder)(encoder.config)
        self.norm = nn.LayerNorm(width, eps=encoder.config.layer_norm_eps)
        self.head = nn.Linear(width, 3 * output_patch_size**2)
        self.basis = DCTBasis(output_patch_size) if output_basis == "dct" else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, N, D) -> normalised pixels (B, 3, G*q, G*q)."""
        hidden = self.blocks(features + self.positions).last_hidden_state
        q = self.output_patch_size
        patches = rearrange(self.head(self.norm(hidden)), "b n (c p q) -> b n c p q", c=3, p=q, q=q)
        with torch.autocast(features.device.type, enabled=False):
            patches = self.basis(patches.float())
        return rearrange(patches, "b (h w) c p q -> b c (h p) (w q)", h=self.grid_size)


class DCTBasis(nn.Module):
    """Patches as sums of cosines: coefficients (..., 3, q, q) -> pixels of the same shape.

    With this fixed, invertible map the head is still linear, but Adam steps along frequencies
    instead of pixels, scaled like the spectra of natural images: fine ones are not learned last.
    """

    basis: Tensor
    scale: Tensor

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        for name in ("basis", "scale"):
            empty = torch.empty(patch_size, patch_size, dtype=torch.float32)
            self.register_buffer(name, empty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The orthonormal DCT-II and an amplitude that falls with frequency."""
        q = self.patch_size
        frequency = torch.arange(q)[:, None]
        cosines = torch.cos(math.pi * (torch.arange(q) + 0.5) * frequency / q) * math.sqrt(2 / q)
        cosines[0] /= math.sqrt(2)
        init.copy_(self.basis, cosines)
        init.copy_(self.scale, q / 2 / (1 + (frequency + frequency.T) * 8 / q))

    def forward(self, coefficients: Tensor) -> Tensor:
        return self.basis.T @ (coefficients * self.scale) @ self.basis
