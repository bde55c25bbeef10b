"""Numbers of a training, gathered on the device and read only when they are logged."""

import torch
from accelerate import Accelerator
from torch import Tensor


class LossWindow:
    """Means of named scalars over a window of micro-batches, over all processes; every image counts the same."""

    def __init__(self) -> None:
        self.sums: dict[
            str, Tensor
        ] = {}  # name -> (sum, count); values that are not finite take no part

    @torch.no_grad()
    def update(self, values: dict[str, Tensor], *, weight: int = 1) -> None:
        """Add one value of each name, the mean of `weight` images; no host synchronisation."""
        for name, value in values.items():
            finite = value.isfinite()
            pair = torch.stack([torch.where(finite, value.float(), 0.0), finite.float()]) * weight
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def gather(self, engine: Accelerator) -> None:
        """Make the sums those of all processes, on each of them; all must hold the same names."""
        if self.sums:
            names = sorted(self.sums)
            totals = engine.reduce(torch.stack([self.sums[name] for name in names]))
            self.sums = dict(zip(names, totals, strict=True))

    def clear(self) -> None:
        """Nothing was seen by this process, though others have seen these names: the next `gather` needs them everywhere."""
        self.sums = {name: torch.zeros_like(pair) for name, pair in self.sums.items()}

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
