"""What the codes of a tokenizer mean and how far apart they are; the report of `vqrae codebook`.

Shapes: B batch, N tokens of an image, M tokens of a batch, K codebook size, E codebook width,
P side of a patch.
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


def write_report(
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

    statistics = measure_codebook(model, batches)
    summary = {"source": source, "tokenizer": tokenizer, **statistics.summary()}
    folder = Path(out)
    write_json(folder / "codebook.json", {**summary, "counts": statistics.counts.tolist()})
    write_text(folder / "codebook.html", codebook_page(model, statistics, summary))
    return (
        f"usage {summary['usage']:.1%}, perplexity {summary['perplexity']:.0f}, "
        f"{summary['dead_codes']} dead codes; see {folder}/codebook.html"
    )


@torch.inference_mode()
def measure_codebook(model: VQRAEModel, batches: Iterable[Tensor]) -> "CodebookStatistics":
    """Statistics over batches of images (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: for a tokenizer with several codebooks.
    """
    statistics = CodebookStatistics(model.code_vectors(), model.config.patch_size)
    for images in batches:
        images = images.to(model.device)
        features = model.project(model.encode_features(images))
        codes = model.quantizer(features).codes
        if codes.ndim != 2:
            raise ValueError(
                f"got a tokenizer with {codes.shape[2]} codebooks; the report is of a single one"
            )
        statistics.update(images, model.quantizer.to_code_space(features), codes)
    return statistics


@torch.no_grad()
def nearest_others(features: Tensor, table: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest row of `table` (K, E), row `own` (M,) excepted, for each of the features (M, E).

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
    """Sums over images, and the first patches of each code, at most one from an image.

    Args:
        table: the code vectors (K, E).
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
            features: (B, N, E) as they are compared with the code vectors.
            codes: (B, N) that the quantizer chose for them.
        """
        features_ME, codes_M = features.flatten(0, 1), codes.flatten()
        error = (features_ME - self.table[codes_M]).norm(dim=1)
        _, other = nearest_others(features_ME, self.table, codes_M)
        margin = 1 - error / other.clamp(min=torch.finfo(other.dtype).tiny)
        bins = (margin * BINS).long().clamp(0, BINS - 1)
        self.margins += torch.bincount(bins, minlength=BINS)
        self.counts += torch.bincount(codes_M, minlength=len(self.table))
        self.squared_error += error.double().square().sum()
        sums = [features_ME.double().sum(0), features_ME.double().square().sum(0)]
        self.feature_sums += torch.stack(sums)
        self.num_images += len(images)
        self._keep_patches(images, codes.cpu())

    def _keep_patches(self, images: Tensor, codes: Tensor) -> None:
        size, columns = self.patch_size, images.shape[-1] // self.patch_size
        for image, row in zip(tensor_to_uint8(images).cpu(), codes, strict=True):
            for code in row[self._kept[row] < EXAMPLES].unique().tolist():
                y, x = divmod(int((row == code).nonzero()[0]), columns)
                patch = image[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
                self.patches[code].append(patch.permute(1, 2, 0).numpy())
                self._kept[code] += 1

    def summary(self) -> dict[str, Any]:
        """The figures of the report.

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
