"""The best code of every feature, exactly, without the matrix of all scores.

A product in a fast precision leaves, for each feature, the codes that the product's own rounding error cannot rule out:
nearly always one or a few. Only those are compared in float64. So the codes depend neither on the precision of the product
nor on how it was cut into blocks, and bf16 costs no accuracy. A feature with too many candidates goes on to the next
precision.

Shapes: R features of a block, E width, K codes, P pairs of a feature and a candidate.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["bf16", "fp32"]

# Scores held at once, so that the block of features shrinks as the codebook grows: 48 MiB in fp32; 12 MiB for bf16, whose
# scores exist a second time in fp32, and whose table is a copy. Larger blocks are hardly faster, smaller ones slower.
BLOCK_SCORES = {"fp32": 3 * 2**22, "bf16": 2**21}
# A GPU waits for the host in every block, where candidates are listed, so its blocks are larger (256 MiB). Not measured.
GPU_BLOCK_SCORES = 2**26
# Features with more candidates than this go on to the next precision.
MAX_CANDIDATES = 32
# Numbers that are widened to float64 at once (4 MiB).
WIDE_NUMBERS = 2**19

# Unit roundoffs: the largest relative error of one rounding.
BF16, FP32, FP64 = 2.0**-8, 2.0**-24, 2.0**-53

# Features (R, E) -> scores (R, K) and their slack (R,): no score is further than that from its true value, up to a shift
# that all codes of a feature share.
Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]


@contextmanager
def exact_products() -> Iterator[None]:
    """A block in which fp32 matrix products are fp32, where TF32 or bf16 may be allowed outside (`torch.backends`)."""
    # torch sets mkldnn's attributes when it is imported, where type checkers do not see them.
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@torch.no_grad()
@exact_products()
def best_codes(
    features: Tensor,
    table: Tensor,
    offsets: Tensor,
    *,
    precision: Precision = "fp32",
    settle: bool = True,
) -> Tensor:
    """Codes (...) with the largest score z.e - offset, for features z (..., E).

    Among scores that float64 cannot tell apart the lowest code wins; a feature that is not finite gets code 0.
    The memory beyond the codes themselves does not grow with the number of features. TF32, where it is on, is off in here.

    Args:
        table: code vectors e (K, E).
        offsets: (K,) float64.
        precision: of the product that finds the candidates. The result is the same; bf16 is faster where the hardware
            multiplies it faster, and needs a bf16 copy of the table.
        settle: False takes the fp32 product at its word, for training: what it cannot tell apart may go either way, and the
            host never waits for the device to list candidates. bf16 is always settled.
    """
    if precision == "fp32" and not settle:
        with torch.autocast(features.device.type, enabled=False):
            rows = features.flatten(0, -2).split(max(1, BLOCK_SCORES["fp32"] // len(table)))
            codes = [(block @ table.T).sub_(offsets.float()).argmax(-1) for block in rows]
        return torch.cat(codes).view(features.shape[:-1])
    names = tuple(SCORERS)
    # Built when first needed: few searches get as far as fp64.
    scorer = functools.cache(lambda name: SCORERS[name](table, offsets))
    block_scores = GPU_BLOCK_SCORES if features.is_cuda else BLOCK_SCORES[precision]
    blocks = features.flatten(0, -2).split(max(1, block_scores // len(table)))
    with torch.autocast(features.device.type, enabled=False):
        codes = [
            _search(block, table, offsets, scorer, names[names.index(precision) :])
            for block in blocks
        ]
    return torch.cat(codes).view(features.shape[:-1])


def _search(
    features: Tensor,
    table: Tensor,
    offsets: Tensor,
    scorer: Callable[[str], Scorer],
    names: tuple[str, ...],
) -> Tensor:
    """Codes (R,) of a block of features (R, E); `names` are the precisions to try, from fast to exact."""
    codes = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    open_rows = torch.arange(len(features), device=features.device)
    for name in names:
        row, code = _candidates(*scorer(name)(features[open_rows]))
        counts = torch.bincount(row, minlength=len(open_rows))
        if (
            name == names[-1]
        ):  # more than MAX_CANDIDATES equals in float64 are copies of one vector, and the lowest wins
            first = counts.cumsum(0) - counts
            kept = torch.arange(len(row), device=row.device) - first[row] < MAX_CANDIDATES
        else:
            kept = counts[row] <= MAX_CANDIDATES
        alone, several = kept & (counts[row] == 1), kept & (counts[row] > 1)
        codes[open_rows[row[alone]]] = code[alone]
        if several.any():
            settled, best = _settle(
                features, table, offsets, open_rows[row[several]], code[several]
            )
            codes[settled] = best
        open_rows = open_rows[counts > MAX_CANDIDATES]
        if len(open_rows) == 0:
            break
    return codes


def _candidates(scores: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and codes (P,) of the scores (R, K) that may belong to the row's best code, in order.

    The best code's score is at most one slack too low, and the highest score at most one too high. Most groups of 64 codes
    hold no candidate, so they are looked at by their maximum only.
    """
    size = math.gcd(scores.shape[1], 64)
    groups = scores.unflatten(1, (-1, size))
    peaks = groups.amax(-1)
    floor = peaks.amax(-1) - 2 * slack
    row, group = (peaks >= floor[:, None]).nonzero(as_tuple=True)
    pair, place = (groups[row, group] >= floor[row, None]).nonzero(as_tuple=True)
    return row[pair], group[pair] * size + place


def _settle(
    features: Tensor, table: Tensor, offsets: Tensor, row: Tensor, code: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows that occur in `row` (P,), sorted, and the best of the candidates `code` (P,) of each, by float64 scores."""
    size = max(1, WIDE_NUMBERS // table.shape[1])
    score = torch.cat([
        torch.linalg.vecdot(features[r].double(), table[c].double()) - offsets[c]
        for r, c in zip(row.split(size), code.split(size), strict=True)
    ])  # fmt: skip
    rows, index = row.unique_consecutive(return_inverse=True)
    best = score.new_full(rows.shape, -torch.inf).scatter_reduce_(0, index, score, "amax")
    largest = (
        features[rows].norm(dim=-1).double() * table[code].norm(dim=-1).max()
        + offsets[code].abs().max()
    )
    equal = score >= (best - 2 * _accumulation(table) * FP64 * largest)[index]
    return rows, code.new_full(rows.shape, len(table)).scatter_reduce_(
        0, index[equal], code[equal], "amin"
    )


def _accumulation(table: Tensor) -> int:
    """Roundings in a sum of E products in any order, and a few for what surrounds it."""
    return table.shape[1] + 16


def _bf16_scorer(table: Tensor, offsets: Tensor) -> Scorer:
    """Centred on the mean code, for bf16 errors grow with the norms and a common part decides nothing.

    With z' = z - m and e' = e - m: z.e - offset = z'.e' - (offset - m.e) + (what all codes share).
    """
    center = table.mean(0)
    low = torch.empty_like(table, dtype=torch.bfloat16)
    norms, losses, shifts = [], [], []
    size = max(1, WIDE_NUMBERS // table.shape[1])
    for part, target in zip(table.split(size), low.split(size), strict=True):
        centred = part - center
        target.copy_(centred)
        norms.append(centred.norm(dim=-1).max())
        losses.append((centred - target.float()).norm(dim=-1).max())
        shifts.append(part.double() @ center.double())
    norm, loss = torch.stack(norms).max(), torch.stack(losses).max()
    shifted = offsets - torch.cat(shifts)
    shifted -= shifted.mean()
    offset, largest_offset = shifted.float(), shifted.abs().max().float()

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:
        centred = features - center
        rounded = centred.bfloat16()
        lost = (centred - rounded.float()).norm(dim=-1)
        length = centred.norm(dim=-1) + lost
        slack = (
            lost * norm
            + length * loss
            + _accumulation(table) * FP32 * (length * (norm + loss) + largest_offset)
        )
        if features.is_cuda:  # a bf16 result could also mean bf16 partial sums there
            product = torch.mm(rounded, low.T, out_dtype=torch.float32)
        else:
            rough = rounded @ low.T
            slack = slack + BF16 * torch.maximum(rough.amax(-1), -rough.amin(-1))
            product = rough.float()
        return product.sub_(offset), 1.01 * slack  # the norms are rounded, too

    return scores


def _fp32_scorer(table: Tensor, offsets: Tensor) -> Scorer:
    norm, offset = table.norm(dim=-1).max(), offsets.float()
    largest_offset = offset.abs().max()

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:
        slack = (
            _accumulation(table) * FP32 * features.norm(dim=-1) * norm + 16 * FP32 * largest_offset
        )
        return (features @ table.T).sub_(offset), 1.01 * slack

    return scores


def _fp64_scorer(table: Tensor, offsets: Tensor) -> Scorer:
    norm, largest_offset = table.norm(dim=-1).max().double(), offsets.abs().max()
    parts = table.split(max(1, WIDE_NUMBERS // table.shape[1]))

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:
        wide = features.double()
        product = torch.cat([wide @ part.double().T for part in parts], dim=-1)
        slack = _accumulation(table) * FP64 * (wide.norm(dim=-1) * norm + largest_offset)
        return product.sub_(offsets), 1.01 * slack

    return scores


SCORERS: dict[str, Callable[[Tensor, Tensor], Scorer]] = {
    "bf16": _bf16_scorer,
    "fp32": _fp32_scorer,
    "fp64": _fp64_scorer,
}


@torch.no_grad()
def nearest_codes(
    features: Tensor, table: Tensor, *, precision: Precision = "fp32", settle: bool = True
) -> Tensor:
    """Codes (...) of the table's rows (K, E) nearest to features (..., E) by Euclidean distance.

    argmin |z - e|^2 = argmax (z.e - |e|^2 / 2); see `best_codes`.
    """
    halves = [
        part.double().square().sum(-1) / 2
        for part in table.split(max(1, WIDE_NUMBERS // table.shape[1]))
    ]
    return best_codes(features, table, torch.cat(halves), precision=precision, settle=settle)
