"""Quantizers by name. A new one is a file here and a line in the table."""

from typing import Any

from vqrae.common.config import did_you_mean
from vqrae.tokenizer.quantizers.base import Quantizer, QuantizerOutput, draw_by_error, kmeans, nearest_codes
from vqrae.tokenizer.quantizers.simvq import SimVQ

QUANTIZERS: dict[str, type[SimVQ]] = {"simvq": SimVQ}

__all__ = [
    "QUANTIZERS",
    "Quantizer",
    "QuantizerOutput",
    "SimVQ",
    "build_quantizer",
    "draw_by_error",
    "kmeans",
    "nearest_codes",
]


def build_quantizer(name: str, codebook_size: int, codebook_dim: int, **options: Any) -> Quantizer:
    """The quantizer of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}. {did_you_mean(name, QUANTIZERS)}")
    return QUANTIZERS[name](codebook_size, codebook_dim, **options)
