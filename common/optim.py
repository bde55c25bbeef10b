"""Optimizers that no library has in the form that the jobs here need."""

from collections.abc import Callable
from typing import Any

import timm.optim.muon
from torch import Tensor, nn


class Muon(timm.optim.muon.Muon):
    """Muon (orthogonalised momentum for matrices, AdamW for groups with `use_fallback`), which skips when told to.

    `found_inf` is what gradient scalers set and fused AdamW obeys: where it is not 0, a step leaves everything as it is.
    Asking costs a host synchronisation, in a step that is long for the orthogonalisation anyway.
    """

    found_inf: Tensor | None = None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step, or none."""
        if self.found_inf is not None and self.found_inf.item():
            return None
        return super().step(closure)


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of a language model: matrices for Muon; vectors, embeddings and head for AdamW."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outer.add(id(head.weight))
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in outer]
    rest = [p for p in trainable if p.ndim != 2 or id(p) in outer]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, "use_fallback": True},
    ]
