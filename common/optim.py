"""Muon, and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm.optim.muon
import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn

# timm's `quintic`, of https://leloykun.github.io/ponder/muon-opt-coeffs
NEWTON_SCHULZ = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
STACKED_VALUES = 2**24  # 64 MiB, and half of that again four times while they are orthogonalised


class Muon(timm.optim.muon.Muon):
    """timm's Muon: orthogonalised momentum for matrices, AdamW for groups with `use_fallback`.

    Matrices of one shape are orthogonalised together, which gives the same bits in less time:
    docs/performance.md.

    A step is skipped where `found_inf` is not 0, as by fused AdamW. Reading it makes the host wait
    for the device, which costs little next to the orthogonalisation.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None, "gradients are computed before the step"
        if self.found_inf is not None and self.found_inf.item():
            return
        gradients: dict[Tensor, Tensor] = {}  # of matrices that are done
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                # The first step is timm's, which decides what is a matrix and makes the buffers.
                if p.grad is not None and "momentum_buffer" in self.state[p]:
                    by_shape[p.shape].append(p)
                    gradients[p] = p.grad
            for shape, same in by_shape.items():
                count = max(1, STACKED_VALUES // shape.numel())
                for start in range(0, len(same), count):
                    self._step_together(same[start : start + count], group)
        for p in gradients:
            p.grad = None
        super().step()
        for p, gradient in gradients.items():
            p.grad = gradient

    def _step_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """The step of matrices, or convolutions, of one shape."""
        first, momentum = parameters[0], group["momentum"]
        updates = first.new_empty(len(parameters), *first.shape)
        for p, update in zip(parameters, updates, strict=True):
            assert p.grad is not None, "only parameters with gradients are stepped"
            buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            torch.lerp(p.grad, buffer, momentum, out=update)
        options = {name: group[name] for name in ("eps", "safety_factor", "scale_eps")}
        matrices = updates.flatten(2)
        matrices = zeropower_via_newtonschulz(matrices, 5, NEWTON_SCHULZ, **options)
        rate = group["lr"] * get_lr_scale(matrices.shape, group["adjust_lr_fn"])
        for p, update in zip(parameters, matrices, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-rate)


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters of a language model: matrices for Muon, the rest for AdamW.

    The rest are vectors, embeddings and heads.
    """
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():  # a model may hold a language model, and heads of its own
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if head is not None:
            outer.add(id(head.weight))
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in outer]
    rest = [p for p in trainable if p.ndim != 2 or id(p) in outer]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, "use_fallback": True},
    ]


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, end: float) -> float:
    """Factor on the base rate at `step`: linear warm-up from 0, then half a cosine from 1 to `end`.

    The first step already has a rate above 0, and the last step has `end`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
