"""Steps without a finite gradient: left out and counted on the device, so that the host never waits for a verdict."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def clip_gradients(
    engine: Accelerator, optimizer: Any, parameters: Iterable[nn.Parameter], max_norm: float
) -> Tensor:
    """Clip gradients, and have the next `optimizer.step()` leave everything as it is where their norm is not finite.

    The fused AdamW itself looks at `found_inf` (what a gradient scaler sets) and then moves neither weights, moments nor step
    count. DeepSpeed clips, checks and skips by itself, with a host synchronisation of its own.

    Returns:
        The norm before clipping over all processes, a scalar tensor; NaN where it is not finite.
    """
    norm = torch.as_tensor(engine.clip_grad_norm_(parameters, max_norm), device=engine.device)
    finite = norm.isfinite()
    optimizer.optimizer.found_inf = (~finite).float()
    return torch.where(finite, norm, torch.nan)


class SkippedSteps(nn.Module):
    """Counts of steps without a finite gradient.

    Attributes:
        total: since the stage began.
        in_a_row: since the last finite one.
    """

    total: Tensor
    in_a_row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.int64))

    def update(self, grad_norm: Tensor) -> None:
        """Count one step by its gradient norm."""
        skipped = ~grad_norm.isfinite()
        self.total += skipped
        self.in_a_row.add_(1).mul_(skipped)
