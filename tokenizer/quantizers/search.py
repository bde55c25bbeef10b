"""The best code of every feature, exactly, without the matrix of all scores.

A fast product leaves, for each feature, the codes that its own rounding error cannot rule out:
nearly always one or a few. Only these candidates are compared in float64. So the codes depend
neither on the precision of the product nor on how it is cut into blocks, and bf16 costs no
accuracy. Features with too many candidates are searched again in the next precision.

Shapes: R features of a block, E width, K codes, n tables, P pairs of a feature and a candidate.
Several tables of K codes are searched at once: each product and reduction then has n parts.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["bf16", "fp32"]

# Scores held at once, so that the block of features shrinks as the codebook grows: 48 MiB in fp32;
# 12 MiB in bf16, whose scores exist a second time in fp32, and whose table is a copy. Larger blocks
# are hardly faster, smaller ones slower.
BLOCK_SCORES = {"fp32": 3 * 2**22, "bf16": 2**21}
# 8 MiB, of several tables: their rows are narrow, so what takes time is reading scores again.
BLOCK_SCORES_OF_TABLES = 2**21
# 256 MiB: the host waits for a GPU in every block, where candidates are listed. Not measured.
GPU_BLOCK_SCORES = 2**26
# Features with more candidates than this are searched again in the next precision.
MAX_CANDIDATES = 32
# Numbers that are widened to float64 at once (4 MiB).
WIDE_NUMBERS = 2**19

# Unit roundoffs: the largest relative error of one rounding.
BF16, FP32 = 2.0**-8, 2.0**-24
FP64 = 2.0**-53

# Features (..., R, E) -> scores (..., R, K) and their slack (..., R): no score is further than that
# from its true value, up to a shift that all codes of a feature share. Of n tables, ... is n.
Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]


def nearest_codes(
    features: Tensor,
    table: Tensor,
    prices: Tensor | None = None,
    *,
    precision: Precision = "fp32",
    exact: bool = True,
) -> Tensor:
    """Codes of the rows of a table, or of n, nearest to features by Euclidean distance.

    argmin |z - e|^2 = argmax (z.e - |e|^2 / 2); see `best_codes`.

    Args:
        prices: (K,), float64, added to the squared distances.
    """
    halves = [part.double().square().sum(-1) / 2 for part in _split_wide(table)]
    offsets = torch.cat(halves, dim=-1)
    if prices is not None:
        offsets = offsets + prices / 2
    return best_codes(features, table, offsets, precision=precision, exact=exact)


@contextmanager
def exact_products() -> Iterator[None]:
    """A block in which fp32 products are fp32, whatever `torch.backends` allows for them."""
    everything: Any = torch.backends  # type checkers do not see the attributes of mkldnn
    backends = [everything.cuda.matmul, everything.mkldnn.matmul]
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
    offsets: Tensor | None = None,
    *,
    precision: Precision = "fp32",
    exact: bool = True,
) -> Tensor:
    """Codes (...) with the largest score z.e - offset, for features z (..., E).

    Among scores that are equal up to float64 rounding the lowest code wins; a feature that is not
    finite gets code 0. Memory beyond the codes does not grow with the number of features.

    Args:
        table: code vectors e (K, E). Of (n, K, E), features (..., n, E) have codes (..., n).
        offsets: (K,) or (n, K), float64; None: all are 0.
        precision: of the product that finds the candidates. The result is the same; bf16 is faster
            where the hardware multiplies it faster, and needs a bf16 copy of the table.
        exact: False skips exact tie-breaking of the fp32 search, so that the host never waits for
            the device: near ties may go either way. bf16 is always exact.
    """
    exact = exact or precision == "bf16"
    several = table.ndim == 3
    block_scores = BLOCK_SCORES_OF_TABLES if several else BLOCK_SCORES[precision]
    if features.is_cuda and (exact or several):
        block_scores = GPU_BLOCK_SCORES
    rows = features.movedim(-2, 0).flatten(1, -2) if several else features.flatten(0, -2)
    blocks = rows.split(max(1, block_scores // table[..., 0].numel()), dim=-2)
    codes = []
    with torch.autocast(features.device.type, enabled=False):
        if exact:
            if offsets is None:
                offsets = table.new_zeros(table.shape[:-1], dtype=torch.float64)
            # Built when first needed: few searches get as far as float64.
            scorer = functools.cache(lambda name: SCORERS[name](table, offsets))
            codes = [_search(block, table, offsets, scorer, precision) for block in blocks]
        else:
            for block in blocks:
                scores = block @ table.mT
                if offsets is not None:
                    scores.sub_(offsets.float().unsqueeze(-2))
                codes.append(scores.max(-1).indices)
    found = torch.cat(codes, dim=-1)
    return (found.T if several else found).reshape(features.shape[:-1])


def _search(
    features: Tensor,
    table: Tensor,
    offsets: Tensor,
    scorer: Callable[[str], Scorer],
    precision: str,
) -> Tensor:
    """Codes (..., R) of a block of features (..., R, E)."""
    scores, slack = scorer(precision)(features)
    row, code = _candidates(scores.flatten(0, -2), slack.flatten())
    length, size = scores.shape[-2:]
    counts = torch.bincount(row, minlength=slack.numel())
    following = {"bf16": "fp32", "fp32": "fp64"}.get(precision)
    if following is None:
        # More than MAX_CANDIDATES equals in float64 are copies of one vector, and the lowest wins.
        first = counts.cumsum(0) - counts
        kept = torch.arange(len(row), device=row.device) - first[row] < MAX_CANDIDATES
    else:
        kept = counts[row] <= MAX_CANDIDATES
    codes = torch.zeros_like(counts)
    alone = kept & (counts[row] == 1)
    codes[row[alone]] = code[alone]
    several = kept & (counts[row] > 1)
    if several.any():
        # All features and all tables as one, in which code k of table i is i K + k.
        flat = (features.flatten(0, -2), table.flatten(0, -2), offsets.flatten())
        row, code = row[several], code[several]
        rows, best = _compare(*flat, row, code + row // length * size)
        codes[rows] = best % size
    codes = codes.view_as(slack)
    crowded = (counts > MAX_CANDIDATES).nonzero().flatten()
    if following is not None and len(crowded) > 0:
        places = (crowded % length).unique()  # in all tables: the result is the same
        again = features[..., places, :]
        codes[..., places] = _search(again, table, offsets, scorer, following)
    return codes


def _candidates(scores: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and codes (P,), in order, of the scores (R, K) that may be the best of their row.

    The score of the best code is at most one slack too low, the highest at most one too high.
    """
    # Most groups of 64 codes hold no candidate, and only their maximum is looked at.
    size = math.gcd(scores.shape[1], 64)
    groups = scores.unflatten(1, (-1, size))
    peaks = groups.amax(-1)
    floor = peaks.amax(-1) - 2 * slack
    row, group = (peaks >= floor[:, None]).nonzero(as_tuple=True)
    pair, place = (groups[row, group] >= floor[row, None]).nonzero(as_tuple=True)
    return row[pair], group[pair] * size + place


def _compare(
    features: Tensor, table: Tensor, offsets: Tensor, row: Tensor, code: Tensor
) -> tuple[Tensor, Tensor]:
    """The different rows of `row` (P,), sorted, and the best candidate of `code` (P,) of each."""
    size = max(1, WIDE_NUMBERS // table.shape[1])
    parts = []
    for rows, codes in zip(row.split(size), code.split(size), strict=True):
        product = torch.linalg.vecdot(features[rows].double(), table[codes].double())
        parts.append(product - offsets[codes])
    score = torch.cat(parts)
    rows, index = row.unique_consecutive(return_inverse=True)
    best = score.new_full(rows.shape, -torch.inf).scatter_reduce_(0, index, score, "amax")
    product = features[rows].norm(dim=-1).double()[index] * table[code].norm(dim=-1)
    largest = torch.zeros_like(best)
    largest.scatter_reduce_(0, index, product + offsets[code].abs(), "amax")
    equal = score >= (best - 2 * _roundings(table) * FP64 * largest)[index]
    lowest = code.new_full(rows.shape, len(table))
    return rows, lowest.scatter_reduce_(0, index[equal], code[equal], "amin")


def _roundings(table: Tensor) -> int:
    """Roundings in a sum of E products in any order, and a few for what surrounds it."""
    return table.shape[-1] + 16


def _split_wide(table: Tensor) -> tuple[Tensor, ...]:
    return table.split(max(1, WIDE_NUMBERS // table[..., 0, :].numel()), dim=-2)


def _largest(values: Tensor) -> Tensor:
    """Of each table: (..., K) -> (..., 1)."""
    return values.amax(-1, keepdim=True)


def _bf16_scorer(table: Tensor, offsets: Tensor) -> Scorer:
    """Centred on the mean code m: bf16 errors grow with the norms, a common part decides nothing.

    With z' = z - m and e' = e - m: z.e - offset = z'.e' - (offset - m.e) + (what all codes share).
    """
    center = table.mean(-2, keepdim=True)
    low = torch.empty_like(table, dtype=torch.bfloat16)
    norms, losses = [], []
    shifts = []
    for part, target in zip(_split_wide(table), _split_wide(low), strict=True):
        centred = part - center
        target.copy_(centred)
        norms.append(_largest(centred.norm(dim=-1)))
        losses.append(_largest((centred - target.float()).norm(dim=-1)))
        shifts.append((part.double() @ center.double().mT).squeeze(-1))
    norm, loss = torch.stack(norms).amax(0), torch.stack(losses).amax(0)
    shifted = offsets - torch.cat(shifts, dim=-1)
    shifted -= shifted.mean(-1, keepdim=True)
    offset, largest_offset = shifted.float().unsqueeze(-2), _largest(shifted.abs()).float()
    multiply: Any = torch.mm if table.ndim == 2 else torch.bmm

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:
        centred = features - center
        rounded = centred.bfloat16()
        lost = (centred - rounded.float()).norm(dim=-1)
        length = centred.norm(dim=-1) + lost
        of_inputs = lost * norm + length * loss
        of_sums = _roundings(table) * FP32 * (length * (norm + loss) + largest_offset)
        slack = of_inputs + of_sums
        if features.is_cuda:  # there a bf16 result could also mean bf16 partial sums
            product = multiply(rounded, low.mT, out_dtype=torch.float32)
        else:
            rough = rounded @ low.mT
            slack = slack + BF16 * torch.maximum(rough.amax(-1), -rough.amin(-1))
            product = rough.float()
        return product.sub_(offset), 1.01 * slack  # the norms are rounded, too

    return scores


def _fp32_scorer(table: Tensor, offsets: Tensor) -> Scorer:
    norm, offset = _largest(table.norm(dim=-1)), offsets.float()
    of_offsets = 16 * FP32 * _largest(offset.abs())

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:
        slack = _roundings(table) * FP32 * features.norm(dim=-1) * norm + of_offsets
        return (features @ table.mT).sub_(offset.unsqueeze(-2)), 1.01 * slack

    return scores


def _fp64_scorer(table: Tensor, offsets: Tensor) -> Scorer:
    norm, largest_offset = _largest(table.norm(dim=-1)).double(), _largest(offsets.abs())

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:
        wide = features.double()
        product = torch.cat([wide @ part.double().mT for part in _split_wide(table)], dim=-1)
        slack = _roundings(table) * FP64 * (wide.norm(dim=-1) * norm + largest_offset)
        return product.sub_(offsets.unsqueeze(-2)), 1.01 * slack

    return scores


SCORERS: dict[str, Callable[[Tensor, Tensor], Scorer]] = {
    "bf16": _bf16_scorer,
    "fp32": _fp32_scorer,
    "fp64": _fp64_scorer,
}
