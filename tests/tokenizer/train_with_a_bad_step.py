"""A training whose images are NaN at one step, which the guard of every engine has to leave out. Run by test_train.py."""

import sys
from typing import Any

from torch import Tensor

from vqrae.tokenizer import train
from vqrae.tokenizer.stage import StageTrainer

BAD_STEP = 2
tokenizer_step = StageTrainer.tokenizer_step


def step_badly(self: StageTrainer, inputs: Tensor, targets: Tensor, step: int) -> Any:
    factor = float("nan") if step == BAD_STEP else 1.0
    return tokenizer_step(self, inputs * factor, targets * factor, step)


if __name__ == "__main__":
    StageTrainer.tokenizer_step = step_badly  # type: ignore[method-assign]
    train.main(sys.argv[1:])
