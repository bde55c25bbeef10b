"""Numbers of a training, gathered on the device and read only when they are logged."""

import torch
from accelerate import Accelerator
from torch import Tensor


class LossWindow:
    """Means of named scalars over a window of micro-batches, over all processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> (sum, count); values that are not finite take no part

    @torch.no_grad()
    def update(self, values: dict[str, Tensor]) -> None:
        """Add one value of each name; no host synchronisation."""
        for name, value in values.items():
            finite = value.isfinite()
            pair = torch.stack([torch.where(finite, value.float(), 0.0), finite.float()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def gather(self, engine: Accelerator) -> None:
        """Make the sums those of all processes, on each of them; all must have seen the same names."""
        if self.sums:
            totals = engine.reduce(torch.stack(list(self.sums.values())))
            self.sums = dict(zip(self.sums, totals, strict=True))

    def means(self) -> dict[str, float]:
        """Mean by name; NaN where no value was finite."""
        return {name: (total / count).item() for name, (total, count) in self.sums.items()}

    def reset(self) -> None:
        """Start a new window."""
        self.sums = {}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)
