"""UniTok's attention projections into the code space and back (arXiv 2502.20321, appendix A).

Shapes: B batch, N tokens, M tokens with those of a cache, I and O widths of input and output, H
heads, C channels of a head.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqrae.common.distributed import FullPrecisionLinear

# Keys and values (B, H, N, C) of new tokens -> those of all tokens (B, H, M, C), the new ones last.
Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class AttentionProjection(nn.Module):
    """A linear map plus attention over the tokens, then an MLP: (B, N, I) -> (B, N, O).

    Attention has the larger of both widths. To compress, its heads are averaged; to expand, they
    are concatenated. The only residual is around the MLP.

    Args:
        num_heads: H; the published weights have 16. Others load as well, and give another output.
        causal: a token sees itself and earlier ones alone (the input of UniTok's language model).

    Raises:
        ValueError: when the heads do not divide the larger width.
    """

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        width = max(in_dim, out_dim)
        if width % num_heads:
            raise ValueError(
                f"projection_heads: got {num_heads}, expected a divisor of the width {width}"
            )
        self.in_dim, self.out_dim = in_dim, out_dim
        self.num_heads, self.causal = num_heads, causal
        self.linear_norm = nn.LayerNorm(in_dim)
        self.linear = FullPrecisionLinear(in_dim, out_dim)
        self.attention_norm = nn.LayerNorm(in_dim)
        self.qkv = FullPrecisionLinear(in_dim, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))  # keys have none: softmax would cancel it
        self.attention_out = FullPrecisionLinear(out_dim, out_dim)
        self.mlp_norm = nn.LayerNorm(out_dim)
        self.mlp = GeGLU(out_dim, 2 * out_dim)

    def forward(
        self, features: Tensor, *, cache: Cache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Project features (B, N, I) -> (B, N, O).

        Args:
            cache: adds the keys and values of earlier tokens, which a causal projection needs when
                tokens come one after the other.
            mask: (…, N, M), of what a token sees, as `scaled_dot_product_attention` takes it; None:
                all tokens, or all that are not later ones.
        """
        attended = self.attend(self.attention_norm(features), cache, mask)
        hidden_BNO = self.linear(self.linear_norm(features)) + attended
        return hidden_BNO + self.mlp(self.mlp_norm(hidden_BNO))

    def attend(self, features: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """Attention of normalised features (B, N, I), in the output's width (B, N, O)."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = rearrange(
            self.qkv(features) + bias, "b n (three h c) -> three b h n c", three=3, h=self.num_heads
        )
        queries, keys, values = qkv.unbind(0)
        if cache is not None:
            keys, values = cache(keys, values)
        num_queries, num_keys = queries.shape[-2], keys.shape[-2]
        if mask is None and self.causal and num_queries > 1:
            everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=keys.device)
            mask = everything.tril(num_keys - num_queries)
        heads_BHNC = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        if self.in_dim <= self.out_dim:
            return self.attention_out(rearrange(heads_BHNC, "b h n c -> b n (h c)"))
        mean_BNC = heads_BHNC.mean(1)
        if mean_BNC.shape[-1] != self.out_dim:
            mean_BNC = F.adaptive_avg_pool1d(mean_BNC, self.out_dim)
        return self.attention_out(mean_BNC)


class GeGLU(nn.Module):
    """Norm, then one linear map gated by the GELU of another (arXiv 2002.05202), as in ViTamin."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.gate = FullPrecisionLinear(dim, hidden_dim)
        self.up = FullPrecisionLinear(dim, hidden_dim)
        self.down = FullPrecisionLinear(hidden_dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features)
        return self.down(F.gelu(self.gate(normed), approximate="tanh") * self.up(normed))
