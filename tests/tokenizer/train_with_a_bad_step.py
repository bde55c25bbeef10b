"""A training whose pictures are NaN at one step, which the guard of every engine has to leave out. Run by test_train.py."""

import sys

from torch import Tensor

from vqrae.tokenizer import train
from vqrae.tokenizer.pictures import StagePictures

BAD_STEP = 2
augment = StagePictures.augment


def augment_badly(self: StagePictures, batch: Tensor, step: int, micro: int) -> Tensor:
    images = augment(self, batch, step, micro)
    return images * float("nan") if step == BAD_STEP else images


if __name__ == "__main__":
    StagePictures.augment = augment_badly  # type: ignore[method-assign]
    train.main(sys.argv[1:])
