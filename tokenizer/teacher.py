"""The teacher: a frozen copy of the encoder as it was before any stage tuned it.

Stage 2 starts from stage 1, which as a rule keeps the encoder; what enters stage 2 is then the original, on the first launch
and on every other, for the weights of a checkpoint are loaded later. Only a stage 1 that tunes its encoder has to keep a copy.
"""

import copy
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from vqrae.common.distributed import is_main_process
from vqrae.common.files import atomic_path


def keep_original(encoder: PreTrainedModel, file: Path, *, tuned: bool) -> None:
    """Write the weights of an encoder that stage 1 starts with if it is going to be tuned; else there is no such file."""
    if not is_main_process():
        return
    file.unlink(missing_ok=True)
    if tuned:
        with atomic_path(file) as temporary:
            save_file(encoder.state_dict(), temporary)


def original_encoder(
    encoder: PreTrainedModel, file: Path, *, bf16: bool = False
) -> PreTrainedModel:
    """A frozen copy of the original encoder.

    Args:
        encoder: as it enters a stage.
        file: the weights that `keep_original` wrote; where there are none, nothing has tuned the encoder.
        bf16: store matrices in bf16, as which bf16 autocast computes with them anyway: half the memory, the same features.
    """
    teacher = copy.deepcopy(encoder).eval().requires_grad_(False)
    if file.exists():
        teacher.load_state_dict(load_file(file))
    for module in teacher.modules() if bf16 else ():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bfloat16()
    return teacher
