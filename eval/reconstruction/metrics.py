"""Metrics of reconstructions as sums, which stream over images and add up over processes.

Shapes: B batch, N tokens, n codebooks of K codes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqrae.common.distributed import sum_over_processes
from vqrae.eval.reconstruction.frechet import FrechetMetric
from vqrae.eval.reconstruction.networks import Distance
from vqrae.eval.reconstruction.protocols import Protocol, SSIMWindow, round_levels, to_score_size
from vqrae.tokenizer.codebook import CodeUsage

MIN_SQUARED_ERROR = 1e-10  # an exact copy counts 100 dB
FEW_IMAGES = 10_000  # a Fréchet distance of fewer is far above that of the published 50,000


class ReconstructionMetrics:
    """All metrics of one evaluation, of n codebooks of K codes; `lpips` by name of the backbone."""

    def __init__(
        self,
        codebook_size: int,
        *,
        num_codebooks: int = 1,
        protocol: Protocol | None = None,
        frechet: Sequence[FrechetMetric] = (),
        lpips: dict[str, Distance] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.protocol = protocol or Protocol()
        self.frechet = frechet
        self.lpips = lpips or {}
        self.usage = CodeUsage(codebook_size, num_codebooks, device)
        self.names = ["num_images", "psnr", "squared_psnr", "squared_error", "ssim"]
        self.names += [f"lpips_{name}" for name in self.lpips]
        if self.protocol.ssim_data_range != 1:
            self.names.append(f"ssim_range_{self.protocol.ssim_data_range:g}")
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def update(self, images: Tensor, reconstruction: Tensor, codes: Tensor) -> None:
        """Add a batch: images (B, 3, H, W) in [0, 1], reconstruction (B, 3, H', W'), codes (B, N).

        A reconstruction is clamped to [0, 1], and resized if it has another size. Codes may also be
        (B, N, n).
        """
        protocol = self.protocol
        original = to_score_size(images, protocol, images.shape[-1])
        reconstruction = to_score_size(reconstruction, protocol, images.shape[-1])

        target = round_levels(original, protocol.rounding)
        copy = round_levels(reconstruction, protocol.rounding)
        error = (target - copy).square().flatten(1).mean(dim=1)
        psnr = -10 * error.clamp(min=MIN_SQUARED_ERROR).log10()
        values = {
            "num_images": torch.ones_like(error),
            "psnr": psnr,
            "squared_psnr": psnr.double().square(),
            "squared_error": error,
            "ssim": ssim(target, copy, protocol.ssim_window, 1.0),
        }
        for name, distance in self.lpips.items():
            values[f"lpips_{name}"] = distance(copy, target)
        if protocol.ssim_data_range != 1:
            inflated = ssim(target, copy, protocol.ssim_window, protocol.ssim_data_range)
            values[self.names[-1]] = inflated
        self.sums += torch.stack([values[name].double().sum() for name in self.names]).to(self.sums)

        self.usage.update(codes.to(self.usage.counts.device))

        if self.frechet:
            target = round_levels(original, protocol.network_rounding)
            copy = round_levels(reconstruction, protocol.network_rounding)
            for metric in self.frechet:
                metric.update(target, copy)

    def reduce(self) -> None:
        """Add up over all processes."""
        sum_over_processes(self.sums)
        sum_over_processes(self.usage.counts)
        for metric in self.frechet:
            metric.reduce()

    def compute(self) -> dict[str, Any]:
        """All metrics over everything that was added.

        Returns:
            psnr (dB), ssim, lpips_*: means over images. psnr_interval: half of the 95 % interval of
            that mean. psnr_pooled: of the squared error over all images together.
            ssim_range_*: at the protocol's data range.
            rfid, inception_score, frechet_*: of the sets.
            codebook_usage: share of the K codes that any image used; dead_codes, dead_share: the
            others. perplexity, entropy_bits: of the codes. Of several codebooks, usage and
            perplexity are means over them, codebook_usage_min is that of the least used, dead codes
            and bits add up.
            num_images, codebook_size, num_codebooks, ssim_variant, notes.
            not_measured: the reason of each distance that is None.

        Raises ValueError when nothing was added, or a reconstruction holds NaN.
        """
        means = dict(zip(self.names, self.sums.tolist(), strict=True))
        count = int(means.pop("num_images"))
        if count == 0:
            raise ValueError("got no images, expected at least one")
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise ValueError(
                f"got {', '.join(broken)} that are not finite: the reconstructions, or the "
                "features of a metric's network, hold NaN. Check the weights"
            )
        means = {name: value / count for name, value in means.items()}
        variance = max(0.0, means.pop("squared_psnr") - means["psnr"] ** 2)
        pooled = -10 * math.log10(max(means.pop("squared_error"), MIN_SQUARED_ERROR))

        usages = (self.usage.counts > 0).double().mean(-1)
        lowest = {"codebook_usage_min": usages.min().item()} if len(usages) > 1 else {}
        entropies = self.usage.entropies()

        distances: dict[str, float | None] = {}
        not_measured: dict[str, str] = {}
        for metric in self.frechet:
            found, reasons = metric.compute()
            distances |= found
            not_measured |= reasons
        few = f"Fréchet distances of {count} images are biased upwards; published ones use 50,000"
        return {
            "psnr": means.pop("psnr"),
            "psnr_interval": 1.96 * math.sqrt(variance / max(count - 1, 1)),
            "psnr_pooled": pooled,
            **means,
            **distances,
            "codebook_usage": usages.mean().item(),
            **lowest,
            "perplexity": entropies.exp().mean().item(),
            "entropy_bits": entropies.sum().item() / math.log(2),
            "dead_codes": int((self.usage.counts == 0).sum()),
            "dead_share": 1 - usages.mean().item(),
            "num_images": count,
            "codebook_size": self.usage.counts.shape[1],
            "num_codebooks": len(usages),
            "ssim_variant": f"{self.protocol.ssim_window}, data range 1",
            "not_measured": not_measured,
            "notes": [few] if distances and count < FEW_IMAGES else [],
        }


# ---- SSIM


def ssim(images: Tensor, copies: Tensor, window: SSIMWindow, data_range: float) -> Tensor:
    """Structural similarity of images (B, 3, H, W), one value per image (B,).

    The mean over channels and windows, in float64, since variances are differences of means of
    squares. Equals scikit-image's `structural_similarity`; for `gaussian_11`, that with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`. Raises ValueError for images
    smaller than the window.
    """
    unbiased = 1.0
    weights = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in range(-5, 6)]
    weights = [weight / sum(weights) for weight in weights]
    if window == "uniform_7":
        weights = [1 / 7] * 7
        unbiased = 49 / 48  # the covariance of samples: n / (n - 1)
    side = len(weights)
    if min(images.shape[-2:]) < side:
        height, width = images.shape[-2:]
        raise ValueError(
            f"got images of {height} x {width}, expected at least {side} pixels for SSIM"
        )
    a, b = images.double(), copies.double()
    if window == "gaussian_11_padded":
        a, b = (F.pad(batch, [side // 2] * 4, mode="reflect") for batch in (a, b))
    mean_a, mean_b = _windowed(a, weights), _windowed(b, weights)
    variance_a = unbiased * (_windowed(a * a, weights) - mean_a**2)
    variance_b = unbiased * (_windowed(b * b, weights) - mean_b**2)
    covariance = unbiased * (_windowed(a * b, weights) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2  # of Wang et al. 2004
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    values = numerator / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return values.flatten(1).mean(1)


def _windowed(images: Tensor, weights: list[float]) -> Tensor:
    """Weighted means (B, C, H', W') over the square windows that fit into images (B, C, H, W)."""
    for axis in (-2, -1):
        places = images.shape[axis] - len(weights) + 1
        total = weights[0] * images.narrow(axis, 0, places)
        # Shifted sums take a third of the time of float64 convolutions on CPU.
        for i, weight in enumerate(weights[1:], start=1):
            total.add_(images.narrow(axis, i, places), alpha=weight)
        images = total
    return images
