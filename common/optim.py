"""Muon, and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import timm.optim.muon
from torch import Tensor, nn


class Muon(timm.optim.muon.Muon):
    """Muon (orthogonalised momentum for matrices, AdamW for groups with `use_fallback`).

    A step is skipped where `found_inf` is not 0, as by fused AdamW. Reading it makes the host wait
    for the device, which costs little next to the orthogonalisation.
    """

    found_inf: Tensor | None = None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if self.found_inf is not None and self.found_inf.item():
            return None
        return super().step(closure)


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
