"""Code search and SimVQ's training step at the paper's size vs what public tokenizers do.

The reference of the search is |z|^2 + |e|^2 - 2 z.e over all features and
codes at once, then argmin; that of several codebooks is one search and one
lookup for each.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, memory_row, time_row
from vqrae.tokenizer.quantizers.mcq import MCQ
from vqrae.tokenizer.quantizers.search import nearest_codes
from vqrae.tokenizer.quantizers.simvq import SimVQ
from vqrae.tokenizer.quantizers.vq import L2VQ

SIZES = (4096, 16_384, 1536)  # features N, codes K, width E
SEVERAL = (4096, 8, 4096, 8)  # features N, codebooks n, codes K of each, width w: UniTok's


def usual_search(features: Tensor, table: Tensor) -> Tensor:
    squares = features.square().sum(1, keepdim=True) + table.square().sum(1)
    return (squares - 2 * features @ table.T).argmin(1)


def search(way: Any, *sizes: int) -> Callable[[], Tensor]:
    """The search that is measured: ours in `fp32` or `bf16`, or the `usual` one."""
    num_features, codebook_size, width = sizes
    generator = torch.Generator().manual_seed(0)
    # Normal: the nearest and the second nearest code are as close as they get.
    features = torch.randn(num_features, width, generator=generator)
    table = torch.randn(codebook_size, width, generator=generator)
    if way == "usual":
        return lambda: usual_search(features, table)
    return lambda: nearest_codes(features, table, precision=way)


def simvq_step(way: str, *sizes: int) -> Callable[[], Tensor]:
    """Search and gradient of the projection; the usual way differentiates the whole table."""
    num_features, codebook_size, width = sizes
    torch.manual_seed(0)
    quantizer = SimVQ(codebook_size, width).train()
    features = torch.randn(1, num_features, width)
    weight = quantizer.projection.weight

    def usual() -> Tensor:
        table = quantizer.projection(quantizer.codebook)
        quantized = F.embedding(usual_search(features[0], table), table)
        return torch.autograd.grad(F.mse_loss(quantized, features[0]), weight)[0]

    def ours() -> Tensor:
        return torch.autograd.grad(quantizer(features).losses["codebook_loss"], weight)[0]

    return usual if way == "usual" else ours


def several_codebooks(way: str, train: bool, *sizes: int) -> Callable[[], Tensor]:
    """Codes and vectors of all codebooks `together`, or of `each` by itself."""
    num_features, num_codebooks, codebook_size, width = sizes
    torch.manual_seed(0)
    together = MCQ(codebook_size, num_codebooks * width, num_codebooks).train(train)
    features = torch.randn(1, num_features, num_codebooks * width)
    each = [L2VQ(codebook_size, width).train(train) for _ in range(num_codebooks)]
    with torch.no_grad():
        for alone, table in zip(each, together.codebook, strict=True):
            alone.codebook.copy_(table)

    @torch.no_grad()
    def one_by_one() -> Tensor:
        parts = zip(each, features.chunk(num_codebooks, dim=-1), strict=True)
        return torch.cat([alone(part).quantized for alone, part in parts], dim=-1)

    @torch.no_grad()
    def at_once() -> Tensor:
        return together(features).quantized

    return at_once if way == "together" else one_by_one


def run(
    sizes: tuple[int, int, int] = SIZES,
    several: tuple[int, int, int, int] = SEVERAL,
    repeats: int = 5,
) -> list[Row]:
    rows = []
    usual = search("usual", *sizes)
    for precision in ("fp32", "bf16"):
        ours = search(precision, *sizes)
        differing = int((ours() != usual()).sum())
        assert differing == 0, f"{differing} codes differ from the reference's"
        rows.append(time_row(f"search {precision}, time", ours, usual, repeats=repeats))
        both = (precision, *sizes), ("usual", *sizes)
        rows.append(memory_row(f"search {precision}, memory", search, *both))
    ours, usual = simvq_step("ours", *sizes), simvq_step("usual", *sizes)
    torch.testing.assert_close(ours(), usual(), rtol=1e-3, atol=1e-6)
    rows.append(time_row("simvq step, time", ours, usual, repeats=repeats))
    for train in (True, False):
        ours = several_codebooks("together", train, *several)
        usual = several_codebooks("each", train, *several)
        torch.testing.assert_close(ours(), usual())
        mode = "training" if train else "exact"
        rows.append(time_row(f"mcq {mode}, time", ours, usual, repeats=repeats))
    return rows
