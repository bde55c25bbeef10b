"""Linear layers on CPU whose weights already lie as oneDNN multiplies them.

A bfloat16 product on CPU first rearranges its weights, at every call; for the few rows of sampling that takes about as long
as the product. Inductor packs weights once, by the operators used here. They are not public, so they are only used where
they are found.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def can_prepack() -> bool:
    """Whether this PyTorch has the operators, and oneDNN computes bfloat16 on this processor."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return (
        all(hasattr(torch.ops.mkldnn, name) for name in names)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PrepackedLinear(nn.Module):
    """A linear layer for inference on CPU, equal to the given one up to the order of sums."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = (
            torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()),
            layer.bias,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


@contextmanager
def prepacked_linears(model: nn.Module) -> Iterator[None]:
    """Let the bfloat16 linear layers of a model on CPU be `PrepackedLinear` for a while; all others stay as they are.

    Takes memory for a second copy of their weights. Not for a compiled model: inductor fails on layers packed before it.
    """
    replaced = []
    try:
        for parent in list(model.modules()) if can_prepack() else ():
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and (layer.weight.device.type, layer.weight.dtype) == (
                    "cpu",
                    torch.bfloat16,
                ):
                    replaced.append((parent, name, layer))
                    setattr(parent, name, PrepackedLinear(layer))
        yield
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)
