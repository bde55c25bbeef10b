"""Learning-rate schedules in optimizer steps."""

import math


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, end: float) -> float:
    """Factor on the base rate at `step`: linear from 0 over the warm-up, then half a cosine from 1 down to `end`.

    The first step already has a rate above 0, the last step has `end`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
