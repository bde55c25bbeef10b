"""What the codes of a tokenizer stand for, and how far apart they are; behind `vqrae codebook`.

Shapes: B batch, M tokens, K codebook size, E codebook width, P pixels of a patch's side.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqrae.common.files import write_json, write_text
from vqrae.common.images import save_image, tensor_to_uint8
from vqrae.tokenizer.modeling import VQRAEModel

BLOCK = 4096  # rows compared at once with the whole table
BINS = 50  # of the histogram of margins
EXAMPLES = 8  # patches that are kept for each code


@torch.no_grad()
def nearest_others(features: Tensor, table: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """For each feature (M, E) the row of the table (K, E) that is nearest but for row `own` (M,): codes (M,), distances (M,).

    Distances are taken anew from the rows found: |z|^2 - 2 z.e + |e|^2 loses the small ones.
    """
    offset = table.square().sum(-1) / 2
    found = []
    for block, mine in zip(features.split(BLOCK), own.split(BLOCK), strict=True):
        scores = (block @ table.T - offset).scatter_(1, mine[:, None], -torch.inf)
        found.append(scores.argmax(1))
    codes = torch.cat(found)
    return codes, (features - table[codes]).norm(dim=1)


@dataclass
class CodebookStatistics:
    """Sums over images, and the first patches of each code, at most one from an image.

    Args:
        table: the code vectors (K, E).
        patch_size: P.
    """

    table: Tensor
    patch_size: int
    num_images: int = 0
    patches: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """By code: uint8 (P, P, 3), cut from the originals in the order of the images."""

    def __post_init__(self) -> None:
        size, device = len(self.table), self.table.device
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.margins = torch.zeros(BINS, dtype=torch.float64, device=device)
        self.squared_error = torch.zeros((), dtype=torch.float64, device=device)
        self.feature_sums = torch.zeros(2, self.table.shape[1], dtype=torch.float64, device=device)
        self._kept = torch.zeros(size, dtype=torch.int64)

    @cached_property
    def neighbors(self) -> tuple[Tensor, Tensor]:
        """For each code vector the nearest other one: codes (K,), distances (K,)."""
        return nearest_others(
            self.table, self.table, torch.arange(len(self.table), device=self.table.device)
        )

    def update(self, images: Tensor, features: Tensor, codes: Tensor) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            features: (B, N, E) as they are compared with the code vectors.
            codes: (B, N) that the quantizer chose for them.
        """
        flat, chosen = features.flatten(0, 1), codes.flatten()
        error = (flat - self.table[chosen]).norm(dim=1)
        _, other = nearest_others(flat, self.table, chosen)
        margin = 1 - error / other.clamp(min=torch.finfo(other.dtype).tiny)
        bins = (margin * BINS).long().clamp(0, BINS - 1)
        self.margins += torch.bincount(bins, minlength=BINS)
        self.counts += torch.bincount(chosen, minlength=len(self.table))
        self.squared_error += error.double().square().sum()
        self.feature_sums += torch.stack([flat.double().sum(0), flat.double().square().sum(0)])
        self.num_images += len(images)
        self._keep_patches(images, codes.cpu())

    def _keep_patches(self, images: Tensor, codes: Tensor) -> None:
        size, columns = self.patch_size, images.shape[-1] // self.patch_size
        for image, row in zip(tensor_to_uint8(images).cpu(), codes, strict=True):
            for code in row[self._kept[row] < EXAMPLES].unique().tolist():
                y, x = divmod(int((row == code).nonzero()[0]), columns)
                patch = image[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
                self.patches.setdefault(code, []).append(patch.permute(1, 2, 0).numpy())
                self._kept[code] += 1

    def summary(self) -> dict[str, Any]:
        """The figures of the report.

        Returns:
            used_codes, dead_codes, usage, perplexity, entropy_bits; top_share: of the tokens that the most frequent hundredth
            of the codes holds; median_margin: 1 - (distance to the code) / (to the nearest other), 0 where they tie;
            error_share: squared distance to the code relative to the variance of the features; rms_error: that distance;
            median_spacing: distance of a used code to its nearest other; duplicates: codes nearer to another than a tenth of
            rms_error.
        """
        counts, tokens = self.counts.double(), int(self.counts.sum())
        share = counts / tokens
        entropy = -torch.special.xlogy(share, share).sum()
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
            "top_share": counts.sort(descending=True)
            .values[: max(1, len(counts) // 100)]
            .sum()
            .item()
            / tokens,
            "median_margin": (middle + 0.5) / BINS,
            "error_share": error / (square - mean.square()).sum().item(),
            "rms_error": math.sqrt(error),
            "median_spacing": spacing[counts > 0].median().item(),
            "duplicates": int((spacing < 0.1 * math.sqrt(error)).sum()),
        }


@dataclass(frozen=True)
class Code:
    """One code as the report shows it."""

    index: int
    count: int
    spacing: float
    """Distance to the nearest other code."""
    neighbor: int
    """That code."""
    alone: np.ndarray
    """uint8 (P', P', 3): the middle of an image that is painted from this code only."""
    patches: list[np.ndarray]
    """uint8 (P, P, 3) each: what was encoded to it."""


@torch.inference_mode()
def describe_codes(
    model: VQRAEModel, statistics: CodebookStatistics, indices: Tensor
) -> list[Code]:
    """Codes `indices` (R,) with their patches, neighbours, and what the decoder paints from each alone."""
    grid = model.config.grid_size
    neighbors, spacing = statistics.neighbors
    found = []
    for block in indices.split(32):
        painted = tensor_to_uint8(
            model.decode(block[:, None].expand(-1, grid**2).to(model.device))
        ).cpu()
        size = painted.shape[-1] // grid
        start = grid // 2 * size
        for code, image in zip(
            block.tolist(), painted[..., start : start + size, start : start + size], strict=True
        ):
            alone, patches = image.permute(1, 2, 0).numpy(), statistics.patches.get(code, [])
            count, near = int(statistics.counts[code]), int(neighbors[code])
            found.append(Code(code, count, spacing[code].item(), near, alone, patches))
    return found


@torch.inference_mode()
def measure_codebook(model: VQRAEModel, batches: Iterable[Tensor]) -> CodebookStatistics:
    """Statistics over batches of images (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: for a tokenizer with several codebooks.
    """
    statistics = CodebookStatistics(model.code_vectors(), model.config.patch_size)
    for images in batches:
        images = images.to(model.device)
        projected = model.project(model.encode_features(images))
        codes = model.quantizer(projected).codes
        if codes.ndim != 2:
            raise ValueError(
                f"got a tokenizer with {codes.shape[2]} codebooks; the report is of a single one"
            )
        statistics.update(images, model.quantizer.to_code_space(projected), codes)
    return statistics


def write_report(
    model: VQRAEModel, batches: Iterable[Tensor], out: str | Path, *, source: str, tokenizer: str
) -> str:
    """Write codebook.html, codebook.png and codebook.json into `out`.

    Args:
        source, tokenizer: what the report says it is of.

    Returns:
        The main figures and where the report is, in a line.
    """
    from vqrae.eval.codebook.page import CodebookPage

    statistics = measure_codebook(model, batches)
    summary = {"source": source, "tokenizer": tokenizer, **statistics.summary()}
    page = CodebookPage(
        summary, statistics, lambda indices: describe_codes(model, statistics, indices)
    )
    folder = Path(out)
    write_json(folder / "codebook.json", {**summary, "counts": statistics.counts.tolist()})
    save_image(page.image(), folder / "codebook.png")
    write_text(folder / "codebook.html", page.html())
    figures = f"usage {summary['usage']:.1%}, perplexity {summary['perplexity']:.0f}, {summary['dead_codes']} dead codes"
    return f"{figures}; see {folder}/codebook.html and codebook.png"
