"""Code search and SimVQ's gradient at the paper's size, beside what public tokenizers do.

The reference of the search is |z|^2 + |e|^2 - 2 z.e over all features and codes at once, then argmin.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqrae.benchmarks.harness import Row, compare, peak_memory
from vqrae.tokenizer.quantizers.projection import ProjectedRows
from vqrae.tokenizer.quantizers.search import Precision, nearest_codes
from vqrae.tokenizer.quantizers.simvq import SimVQ

NUM_FEATURES, CODEBOOK_SIZE, CODEBOOK_DIM = 4096, 16384, 1536


def run(
    num_features: int = NUM_FEATURES,
    codebook_size: int = CODEBOOK_SIZE,
    codebook_dim: int = CODEBOOK_DIM,
    repeats: int = 5,
) -> list[Row]:
    """Time and peak memory of the search in both precisions, and the time of SimVQ's gradient.

    Raises:
        RuntimeError: when results differ.
    """
    sizes = (num_features, codebook_size, codebook_dim)
    rows = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        ours, reference = search(precision, *sizes), usual_search(*sizes)
        require_equal(ours(), reference())
        rows.append(Row(f"search {precision}, time", *compare(ours, reference, repeats), "s"))
    del ours, reference
    usual_memory = peak_memory(usual_search, *sizes)
    for precision in precisions:
        memory = peak_memory(search, precision, *sizes)
        rows.append(Row(f"search {precision}, memory", memory, usual_memory, "MiB"))
    ours, reference = simvq_gradient(*sizes), whole_table_gradient(*sizes)
    torch.testing.assert_close(ours(), reference(), rtol=1e-3, atol=1e-4)
    rows.append(Row("simvq gradient, time", *compare(ours, reference, repeats), "s"))
    return rows


def require_equal(ours: Tensor, reference: Tensor) -> None:
    differing = (ours != reference).sum().item()
    if differing:
        raise RuntimeError(f"{differing} of {ours.numel()} codes differ from the reference's")


def inputs(num_features: int, codebook_size: int, codebook_dim: int) -> tuple[Tensor, Tensor]:
    """Features (N, E) and a table (K, E), normal: nearest and second nearest are as close as they get."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_features, codebook_dim, generator=generator)
    return features, torch.randn(codebook_size, codebook_dim, generator=generator)


def search(precision: Precision, *sizes: int) -> Callable[[], Tensor]:
    features, table = inputs(*sizes)
    return lambda: nearest_codes(features, table, precision=precision)


def usual_search(*sizes: int) -> Callable[[], Tensor]:
    features, table = inputs(*sizes)
    return lambda: (
        features.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * features @ table.T
    ).argmin(1)


def simvq(*sizes: int) -> tuple[SimVQ, Tensor, Tensor]:
    """A quantizer in training, with codes (N,) that some features might have chosen and the gradient (N, E) of their rows."""
    num_features, codebook_size, codebook_dim = sizes
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(codebook_size, (num_features,), generator=generator)
    return (
        SimVQ(codebook_size, codebook_dim).train(),
        codes,
        torch.randn(num_features, codebook_dim, generator=generator),
    )


def simvq_gradient(*sizes: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    quantizer, codes, gradient = simvq(*sizes)

    def step() -> Tensor:
        weights = (quantizer.codebook, quantizer.projection.weight, quantizer.projection.bias)
        rows = ProjectedRows.apply(quantizer.table(), codes, *weights)
        return torch.autograd.grad(rows, quantizer.projection.weight, gradient)[0]

    return step


def whole_table_gradient(*sizes: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    quantizer, codes, gradient = simvq(*sizes)

    def step() -> Tensor:
        rows = nn.functional.embedding(codes, quantizer.projection(quantizer.codebook))
        return torch.autograd.grad(rows, quantizer.projection.weight, gradient)[0]

    return step
