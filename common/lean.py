"""Parts of transformers' models that train faster on a CPU, with the same numbers up to rounding.

There the products of small matrices are cheap, and passes over long tensors are what takes time.

Shapes: B batch, H heads, K heads of keys and values, T tokens, S tokens they see, d head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

# Norms whose output several linear layers read, in Qwen3 and SigLIP.
READ_TWICE = ("input_layernorm", "post_attention_layernorm", "layer_norm1")


def make_lean(model: nn.Module) -> None:
    """Prepare a model for training on a CPU, in place; weights and their names stay.

    `eager` means `lean_attention` from now on, for all models of transformers in this process.
    """
    AttentionInterface.register("eager", lean_attention)
    for name, module in model.named_modules():
        if type(module) is Qwen3RMSNorm:
            module.__class__ = LeanRMSNorm
        if name.endswith(READ_TWICE):
            module.register_forward_hook(cast_once)


def cast_once(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: the cast of autocast, which each linear layer that follows would repeat."""
    device = output.device.type
    enabled = torch.is_autocast_enabled(device)
    return output.to(torch.get_autocast_dtype(device)) if enabled else output


def lean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` (B, H, T, d) to `key` and `value` (B, K, S, d) -> (B, T, H, d), weights.

    Under autocast the scores (B, H, T, S), the longest tensors of a small model, stay in 16 bits,
    where the softmax computes in fp32 inside. transformers' own takes them to fp32 and back, and
    copies keys and values for each of their H / K heads.

    Args:
        attention_mask: (B, 1, T, S), added to the scores.

    Raises:
        ValueError: for a model whose attention does more than that.
    """
    if options.get("softcap") is not None or hasattr(module, "sinks"):
        name = type(module).__name__
        raise ValueError(f"got {name}, whose attention is not plain: set attention to sdpa")
    (batch, heads, length, width), shared = query.shape, key.shape[1]
    query = (query * scaling).reshape(batch, shared, -1, width)
    scores = torch.matmul(query, key.mT).view(batch, heads, length, -1)
    if attention_mask is not None:
        # In 16 bits the lowest number of fp32 is -inf, and a row that sees nothing would be NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores + attention_mask.clamp(min=lowest).to(scores.dtype)
    # Outside of autocast, which would make it fp32.
    with torch.autocast(scores.device.type, enabled=False):
        weights = scores.softmax(-1)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    output = torch.matmul(weights.view(batch, shared, -1, weights.shape[-1]), value)
    return output.view(batch, heads, length, width).transpose(1, 2).contiguous(), weights


def root_mean_square_norm(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x (…, D) with a mean square of 1, and the scales (…, 1), fp32, that make it so."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * scale).to(x.dtype), scale


class LeanRMSNorm(Qwen3RMSNorm):
    """The norm of Qwen3 with half of the passes, most of them in its backward pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed, scale = root_mean_square_norm(x, epsilon)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        along = gradient * normed
        mean = (along @ weight).unsqueeze(-1) / weight.numel()
        of_x = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return of_x.to(normed.dtype), along.flatten(0, -2).sum(0), None
