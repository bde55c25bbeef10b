"""Quantizers by name. A new one is a file in this folder and a line in the table."""

import inspect
from typing import Any

from vqrae.common.config import did_you_mean
from vqrae.tokenizer.quantizers.base import Quantizer
from vqrae.tokenizer.quantizers.ema_vq import EMAVQ
from vqrae.tokenizer.quantizers.fsq import FSQ
from vqrae.tokenizer.quantizers.ibq import IBQ
from vqrae.tokenizer.quantizers.mcq import MCQ
from vqrae.tokenizer.quantizers.rvq import RVQ
from vqrae.tokenizer.quantizers.simvq import SimVQ
from vqrae.tokenizer.quantizers.vq import L2VQ, VQ

QUANTIZERS: dict[str, type[Quantizer]] = {
    "simvq": SimVQ,
    "vq": VQ,
    "ema_vq": EMAVQ,
    "l2_vq": L2VQ,
    "ibq": IBQ,
    "fsq": FSQ,
    "mcq": MCQ,
    "rvq": RVQ,
}


def quantizer_class(name: str) -> type[Quantizer]:
    """The class of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}. {did_you_mean(name, QUANTIZERS)}")
    return QUANTIZERS[name]


def build_quantizer(
    name: str, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, **options: Any
) -> Quantizer:
    """The quantizer of that name; `options` are the keyword-only arguments of its class.

    Raises:
        ValueError: for an unknown name or option, listing the known ones, for a missing option, and
            for several codebooks of a quantizer that has one.
    """
    quantizer = quantizer_class(name)
    sizes = [codebook_size, codebook_dim]
    if quantizer.has_several_codebooks:
        sizes.append(num_codebooks)
    elif num_codebooks != 1:
        several = [key for key, each in QUANTIZERS.items() if each.has_several_codebooks]
        raise ValueError(
            f"num_codebooks: got {num_codebooks} for quantizer {name}, which has one: set 1, or a "
            f"quantizer of {several}"
        )
    parameters = inspect.signature(quantizer).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key in options:
        if key not in known:
            raise ValueError(
                f"quantizer_options.{key}: unknown option of {name}. {did_you_mean(key, known)}"
            )
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"quantizer_options.{key} is required by {name}")
    return quantizer(*sizes, **options)
