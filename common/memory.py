"""What training takes of a GPU's memory: weights, gradients and moments by arithmetic, activations by a forward pass over
tensors that have shapes and no content.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

GIB = 2**30
PLANNING_ATTENTION = "vqrae_planning"
"""An attention implementation that computes nothing and keeps for the backward pass what fused kernels keep."""


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters of a module: all of them, and those that are trained. ZeRO-3's parts count whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def weight_bytes(module: nn.Module) -> int:
    """What parameters and buffers of a module occupy."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def state_bytes(
    weights: float, trained: int, *, zero: int, gpus: int, gradient_bytes: int = 4
) -> float:
    """What weights, gradients and AdamW's moments occupy on each GPU.

    ZeRO partitions its fp32 copy of the weights and the moments, at stage 2 the gradients too, at stage 3 everything.

    Args:
        weights: bytes of all weights, frozen ones included.
        trained: trained parameters.
        gradient_bytes: of one gradient: 4 in fp32, 2 where the weights are bf16.
    """
    gradients, moments, master = gradient_bytes * trained, 8 * trained, 4 * trained
    if zero == 0:
        return weights + gradients + moments
    if zero == 1:
        return weights + gradients + (moments + master) / gpus
    if zero == 2:
        return weights + (gradients + moments + master) / gpus
    return (weights + gradients + moments + master) / gpus


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, with and without activation checkpointing."""

    whole: int
    checkpointed: int
    """The inputs of all blocks, what lies outside of them, and the largest block while it is computed again."""


def measure_activations(forward: Callable[[], Tensor], modules: nn.Module) -> Activations:
    """Run `forward` and count what autograd keeps; parameters are not counted, for they are there anyway.

    Args:
        forward: computes a loss from tensors that it makes itself.
        modules: everything that takes part, on the meta device and with `attn_implementation=PLANNING_ATTENTION`; their blocks
            are what activation checkpointing computes again. They are of no further use.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):  # autocast does not know the device "meta"
        return _measure(forward, modules.to_empty(device="cpu"))


def _measure(forward: Callable[[], Tensor], modules: nn.Module) -> Activations:
    seen = {
        tensor.untyped_storage()._cdata for tensor in (*modules.parameters(), *modules.buffers())
    }
    kept: list[Tensor] = []  # alive, so that no storage takes the place of another
    total = 0
    blocks: list[tuple[int, int]] = []  # (bytes of its input, bytes that it keeps)
    starts: list[tuple[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)
            total += storage.nbytes()
        return tensor

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        starts.append((hidden.numel() * hidden.element_size(), total))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        size, before = starts.pop()
        blocks.append((size, total - before))

    handles = []
    for module in modules.modules():
        if isinstance(module, GradientCheckpointingLayer):
            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave),
            ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    trained = [(size, inner) for size, inner in blocks if inner]  # a frozen tower keeps nothing
    inside = sum(inner for _, inner in trained)
    largest = max((inner for _, inner in trained), default=0)
    return Activations(
        total, min(total, total - inside + sum(size for size, _ in trained) + largest)
    )


class _FusedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, output and one fp32 number for each query and head (FlashAttention, 2307.08691)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("memory is planned without a backward pass")


def _planning_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLANNING_ATTENTION, _planning_attention)
