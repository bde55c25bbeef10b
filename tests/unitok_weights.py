"""Weights and inputs that tests of generation share with their `golden/unitok_heads.py`."""

import zlib
from typing import Any

import torch
from torch import Tensor

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}
NUM_CODEBOOKS, CODEBOOK_SIZE, NUM_CLASSES, GRID = 4, 16, 5, 3


def named_numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers that depend on a name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.3 * torch.randn(shape, generator=generator)


def inputs() -> dict[str, Tensor]:
    """What both sides compute on: states, codes of M positions, codes of images, classes."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator}
    return {
        "hidden": named_numbers("hidden", (3, LLAMA["hidden_size"])),
        "codes": torch.randint(CODEBOOK_SIZE, (3, NUM_CODEBOOKS), **options),
        "images": torch.randint(CODEBOOK_SIZE, (2, GRID**2, NUM_CODEBOOKS), **options),
        "classes": torch.tensor([1, 4]),
    }
