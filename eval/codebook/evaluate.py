"""What the codes of a tokenizer mean and how far apart they are; the report of `vqrae codebook`.

Shapes: B batch, N tokens of an image, M tokens of a batch, n codebooks of K codes with vectors of
width w, P side of a patch.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqrae.common.files import write_json, write_text
from vqrae.common.images import tensor_to_uint8
from vqrae.tokenizer.modeling import VQRAEModel

BLOCK = 4096  # rows compared at once with the whole table
BINS = 50  # of the histogram of margins
EXAMPLES = 8  # patches that are kept for each code


def write_codebook_report(
    model: VQRAEModel, batches: Iterable[Tensor], out: str | Path, *, source: str, tokenizer: str
) -> str:
    """Write codebook.html and codebook.json into `out`.

    Args:
        batches: images (B, 3, H, W) in [0, 1].
        source, tokenizer: what the report says that it is of.

    Returns:
        The main figures and where the report is, in a line.
    """
    from vqrae.eval.codebook.page import codebook_page  # matplotlib takes a second to import

    statistics = measure_codebooks(model, batches)
    summary = {"source": source, "tokenizer": tokenizer, **summarize(statistics)}
    folder = Path(out)
    counts = [each.counts.tolist() for each in statistics]
    if len(counts) == 1:
        [counts] = counts
    write_json(folder / "codebook.json", {**summary, "counts": counts})
    write_text(folder / "codebook.html", codebook_page(model, statistics, summary))
    return (
        f"usage {summary['usage']:.1%}, perplexity {summary['perplexity']:.0f}, "
        f"{summary['dead_codes']} dead codes; see {folder}/codebook.html"
    )


@torch.inference_mode()
def measure_codebooks(model: VQRAEModel, batches: Iterable[Tensor]) -> list["CodebookStatistics"]:
    """Statistics of each codebook over batches of images (B, 3, H, W) in [0, 1]."""
    number, patch_size = model.config.num_codebooks, model.config.patch_size
    tables = model.code_vectors().view(number, model.config.codebook_size, -1)
    statistics = [CodebookStatistics(table, patch_size) for table in tables]
    for images in batches:
        images = images.to(model.device)
        features = model.project(model.encode_fused(images)).flatten(0, 1)
        codes = model.quantizer(features[None]).codes[0]
        targets, _ = model.quantizer.targets(features, codes)
        by_codebook = codes.view(len(codes), number).T
        for each, target, chosen in zip(statistics, targets, by_codebook, strict=True):
            each.update(images, target, chosen)
    return statistics


def summarize(statistics: list["CodebookStatistics"]) -> dict[str, Any]:
    """The figures of the report.

    Returns:
        Of one codebook its `CodebookStatistics.summary`. Of several: num_images, tokens,
        codebook_size, num_codebooks; the sums of used_codes, dead_codes and entropy_bits; the means
        of usage, perplexity, top_share, error_share and median_margin; codebooks, each summary.
    """
    each = [one.summary() for one in statistics]
    if len(each) == 1:
        return each[0]
    summary = {name: each[0][name] for name in ("num_images", "tokens", "codebook_size")}
    summary["num_codebooks"] = len(each)
    for name in ("used_codes", "dead_codes", "entropy_bits"):
        summary[name] = sum(values[name] for values in each)
    for name in ("usage", "perplexity", "top_share", "error_share", "median_margin"):
        summary[name] = sum(values[name] for values in each) / len(each)
    return {**summary, "codebooks": each}


@torch.no_grad()
def nearest_others(features: Tensor, table: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest row of `table` (K, w), row `own` (M,) excepted, for each of the features (M, w).

    Distances are computed again from the rows found: |z|^2 - 2 z.e + |e|^2 loses small ones.

    Returns:
        Codes (M,) and distances (M,).
    """
    offset = table.square().sum(-1) / 2
    found = []
    for block, mine in zip(features.split(BLOCK), own.split(BLOCK), strict=True):
        scores = (block @ table.T - offset).scatter_(1, mine[:, None], -torch.inf)
        found.append(scores.argmax(1))
    codes = torch.cat(found)
    return codes, (features - table[codes]).norm(dim=1)


class CodebookStatistics:
    """Of a codebook: sums over images, and the first patches of each code, one from an image.

    Args:
        table: the code vectors (K, w).
        patch_size: P.

    Attributes:
        patches: by code, uint8 (P, P, 3), cut from the originals in the order of the images.
    """

    def __init__(self, table: Tensor, patch_size: int) -> None:
        self.table = table
        self.patch_size = patch_size
        self.num_images = 0
        self.patches: dict[int, list[np.ndarray]] = defaultdict(list)
        size, device = len(table), table.device
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.margins = torch.zeros(BINS, dtype=torch.float64, device=device)
        self.squared_error = torch.zeros((), dtype=torch.float64, device=device)
        self.feature_sums = torch.zeros(2, table.shape[1], dtype=torch.float64, device=device)
        self._kept = torch.zeros(size, dtype=torch.int64)  # patches of each code

    @cached_property
    def neighbors(self) -> tuple[Tensor, Tensor]:
        """For each code vector the nearest other one: codes (K,), distances (K,)."""
        own = torch.arange(len(self.table), device=self.table.device)
        return nearest_others(self.table, self.table, own)

    def update(self, images: Tensor, features: Tensor, codes: Tensor) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            features: (M, w) as they are compared with the code vectors, in the order of the images.
            codes: (M,) that the quantizer chose for them.
        """
        error = (features - self.table[codes]).norm(dim=1)
        _, other = nearest_others(features, self.table, codes)
        margin = 1 - error / other.clamp(min=torch.finfo(other.dtype).tiny)
        bins = (margin * BINS).long().clamp(0, BINS - 1)
        self.margins += torch.bincount(bins, minlength=BINS)
        self.counts += torch.bincount(codes, minlength=len(self.table))
        self.squared_error += error.double().square().sum()
        sums = [features.double().sum(0), features.double().square().sum(0)]
        self.feature_sums += torch.stack(sums)
        self.num_images += len(images)
        self._keep_patches(images, codes.view(len(images), -1).cpu())

    def _keep_patches(self, images: Tensor, codes: Tensor) -> None:
        size, columns = self.patch_size, images.shape[-1] // self.patch_size
        for image, row in zip(tensor_to_uint8(images).cpu(), codes, strict=True):
            for code in row[self._kept[row] < EXAMPLES].unique().tolist():
                y, x = divmod(int((row == code).nonzero()[0]), columns)
                patch = image[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
                self.patches[code].append(patch.permute(1, 2, 0).numpy())
                self._kept[code] += 1

    def summary(self) -> dict[str, Any]:
        """The figures of this codebook.

        Returns:
            num_images, tokens, codebook_size, used_codes, dead_codes, usage, perplexity,
            entropy_bits.
            top_share: of the tokens that the most frequent hundredth of the codes holds.
            median_margin: 1 - (distance to the code) / (to the nearest other), 0 where they tie.
            error_share: squared distance to the code relative to the variance of the features.
            rms_error: that distance.
            median_spacing: distance of a used code to its nearest other.
            duplicates: codes nearer to another than a tenth of rms_error.
        """
        counts, tokens = self.counts.double(), int(self.counts.sum())
        share = counts / tokens
        entropy = -torch.special.xlogy(share, share).sum()
        top = counts.sort(descending=True).values[: max(1, len(counts) // 100)]
        mean, square = self.feature_sums / tokens
        error = self.squared_error.item() / tokens
        spacing = self.neighbors[1]
        middle = int(torch.searchsorted(self.margins.cumsum(0), self.margins.sum() / 2))
        used = int((counts > 0).sum())
        return {
            "num_images": self.num_images,
            "tokens": tokens,
            "codebook_size": len(counts),
            "used_codes": used,
            "dead_codes": len(counts) - used,
            "usage": used / len(counts),
            "perplexity": entropy.exp().item(),
            "entropy_bits": entropy.item() / math.log(2),
            "top_share": top.sum().item() / tokens,
            "median_margin": (middle + 0.5) / BINS,
            "error_share": error / (square - mean.square()).sum().item(),
            "rms_error": math.sqrt(error),
            "median_spacing": spacing[counts > 0].median().item(),
            "duplicates": int((spacing < 0.1 * math.sqrt(error)).sum()),
        }
