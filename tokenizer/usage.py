"""How much of the codebook is alive."""

import torch
from accelerate import Accelerator
from torch import Tensor


class CodeUsage:
    """Counts of codes over a window that the caller names.

    Args:
        codebook_size: K.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, codes: Tensor) -> None:
        """Count codes of any shape; no host synchronisation."""
        flat = codes.flatten()
        self.counts.index_add_(0, flat, torch.ones_like(flat))

    def gather(self, engine: Accelerator) -> None:
        """Make the counts those of all processes, on each of them."""
        self.counts = engine.reduce(self.counts)

    def clear(self) -> None:
        """Nothing was seen by this process."""
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.counts.zero_()

    @property
    def usage(self) -> float:
        """Share of the K codes that occurred in the window."""
        return (self.counts > 0).float().mean().item()

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the code distribution: the number of codes in equal use."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        return torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item()

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["counts"])
