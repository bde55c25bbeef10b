"""Codes that nothing chose for a while come back to life."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from vqrae.tokenizer.modeling import VQRAEModel, VQRAEOutput
from vqrae.tokenizer.quantizers.base import draw_by_error
from vqrae.tokenizer.usage import CodeUsage


@torch.no_grad()
def revive_dead_codes(
    model: VQRAEModel, output: VQRAEOutput, usage: CodeUsage, engine: Accelerator, *, seed: int
) -> int:
    """Move every code that `usage` did not see onto a badly served feature; the same on all processes.

    Args:
        output: of the newest batch, whose features are on offer.
        usage: since the last time; it begins anew.
        seed: of the draw.

    Returns:
        How many were moved.
    """
    quantizer: Any = model.quantizer
    usage.gather(engine)
    dead = (usage.counts == 0).nonzero().flatten()
    usage.reset()
    if len(dead) > 0:
        features = model.project(output.features).flatten(0, 1)
        errors = (
            (quantizer.to_code_space(features) - quantizer.lookup(output.codes).flatten(0, 1))
            .square()
            .sum(-1)
        )
        chosen = draw_by_error(errors, len(dead), torch.Generator(errors.device).manual_seed(seed))
        quantizer.revive(dead, broadcast(features[chosen]))
    return len(dead)
