"""Metrics of reconstructions as sums: they stream over any number of images and add up over processes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqrae.common.distributed import sum_over_processes
from vqrae.eval.reconstruction.frechet import FeatureStatistics, InceptionScore, frechet_distance
from vqrae.eval.reconstruction.protocols import Protocol, round_levels, ssim, to_score_size

MIN_SQUARED_ERROR = 1e-10  # an exact copy counts 100 dB
FEW_IMAGES = (
    10_000  # a Fréchet distance of fewer is far above that of the 50,000 that are published
)
Distance = Callable[[Tensor, Tensor], Tensor]


class FrechetMetric:
    """Fréchet distance between originals and copies in the features of one network; with Inception, rFID and its score.

    Args:
        network: images (B, 3, H, W) in [0, 1] -> features (B, D) and logits (or None); its `name` names the result.
        reference: statistics of the originals, when they are known already.
    """

    def __init__(
        self, network: Any, reference: FeatureStatistics | None, device: torch.device | str
    ) -> None:
        self.network = network.to(device)
        self.known = reference is not None
        self.originals = reference or FeatureStatistics(network.width, device)
        self.copies = FeatureStatistics(network.width, device)
        self.score: InceptionScore | None = None

    @property
    def key(self) -> str:
        """`rfid` for Inception, which defines it; everything else is named for what it is."""
        return "rfid" if self.network.name == "inception" else f"frechet_{self.network.name}"

    def update(self, images: Tensor, copies: Tensor) -> None:
        """Add a batch, both (B, 3, H, W) at the levels that the protocol wants."""
        if not self.known:
            self.originals.update(self.network(images)[0])
        features, logits = self.network(copies)
        self.copies.update(features)
        if self.key == "rfid":
            self.score = self.score or InceptionScore(logits.shape[1], logits.device)
            self.score.update(logits)

    def reduce(self) -> None:
        """Add up over all processes."""
        if not self.known:
            self.originals.reduce()
        self.copies.reduce()
        if self.score is not None:
            self.score.reduce()

    def compute(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """The distance and, from Inception, the score; and by name why one of them cannot be taken.

        A distance that fails costs no other metric of the run.
        """
        values: dict[str, float | None] = {self.key: None}
        if self.score is not None:
            values["inception_score"] = self.score.compute()
        try:
            values[self.key] = frechet_distance(self.originals, self.copies)
        except ValueError as error:
            return values, {self.key: str(error)}
        return values, {}


class ReconstructionMetrics:
    """All metrics of one evaluation.

    Args:
        codebook_size: K.
        num_codebooks: G; with several, shares and perplexity are means over the codebooks.
        protocol: how images are compared.
        frechet: Fréchet distances to take.
        lpips: perceptual distances to take, by the name of their backbone.
    """

    def __init__(
        self,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        protocol: Protocol | None = None,
        frechet: tuple[FrechetMetric, ...] = (),
        lpips: dict[str, Distance] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.codebook_size, self.protocol = codebook_size, protocol or Protocol()
        self.frechet, self.lpips = frechet, lpips or {}
        self.histogram = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64, device=device)
        self.names = [
            "num_images",
            "psnr",
            "squared_error",
            "ssim",
            *(f"lpips_{name}" for name in self.lpips),
        ]
        if self.protocol.ssim_data_range != 1:
            self.names.append(f"ssim_range_{self.protocol.ssim_data_range:g}")
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def update(self, images: Tensor, reconstruction: Tensor, codes: Tensor) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            reconstruction: (B, 3, H', W'); what exceeds [0, 1] is clamped, another size is resized.
            codes: (B, N), or (B, N, G) with several codebooks.

        Raises:
            ValueError: when the two are not as many, or codes are of another number of codebooks.
        """
        if codes.shape[2:].numel() != len(self.histogram):  # of no dimensions: 1
            raise ValueError(
                f"got codes {tuple(codes.shape)}, expected those of {len(self.histogram)} codebooks"
            )
        if len(images) != len(reconstruction):
            raise ValueError(
                f"got images {tuple(images.shape)} and reconstruction {tuple(reconstruction.shape)}, expected as many"
            )
        protocol, side = self.protocol, images.shape[-1]
        pair = [to_score_size(batch, protocol, side) for batch in (images, reconstruction)]
        target, copy = (round_levels(batch, protocol.rounding) for batch in pair)
        error = (target - copy).square().flatten(1).mean(dim=1)
        values = {
            "num_images": torch.ones_like(error),
            "psnr": -10 * error.clamp(min=MIN_SQUARED_ERROR).log10(),
            "squared_error": error,
            "ssim": ssim(target, copy, protocol.ssim_window, 1.0),
            **{f"lpips_{name}": distance(target, copy) for name, distance in self.lpips.items()},
        }
        if protocol.ssim_data_range != 1:
            values[self.names[-1]] = ssim(
                target, copy, protocol.ssim_window, protocol.ssim_data_range
            )
        self.sums += torch.stack([values[name].double().sum() for name in self.names]).to(self.sums)
        for counts, column in zip(
            self.histogram, codes.reshape(-1, len(self.histogram)).T, strict=True
        ):
            counts += torch.bincount(column, minlength=self.codebook_size).to(counts)
        if self.frechet:
            target, copy = (round_levels(batch, protocol.network_rounding) for batch in pair)
            for metric in self.frechet:
                metric.update(target, copy)

    def reduce(self) -> None:
        """Add up over all processes."""
        sum_over_processes(self.sums)
        sum_over_processes(self.histogram)
        for metric in self.frechet:
            metric.reduce()

    def compute(self) -> dict[str, Any]:
        """All metrics over everything that was added.

        Returns:
            psnr (dB), ssim, lpips_*: means over images. psnr_pooled: of the squared error over all images together.
            ssim_range_*: at the protocol's data range. rfid, inception_score, frechet_*: of the sets.
            codebook_usage: the share of the K codes that any image used; dead_codes, dead_share: those that none did.
            perplexity, entropy_bits: of the codes. num_images, codebook_size, ssim_variant, notes.
            not_measured: the reason of each distance that is None.

        Raises:
            ValueError: when nothing was added, or a reconstruction holds NaN.
        """
        means = dict(zip(self.names, self.sums.tolist(), strict=True))
        count = int(means.pop("num_images"))
        if count == 0:
            raise ValueError("got no images, expected at least one")
        if broken := [name for name, value in means.items() if not math.isfinite(value)]:
            raise ValueError(
                f"got {', '.join(broken)} that are not finite: the reconstructions, or the features of "
                "a metric's network, hold NaN. Check the weights"
            )
        means = {name: value / count for name, value in means.items()}
        pooled = -10 * math.log10(max(means.pop("squared_error"), MIN_SQUARED_ERROR))
        counts = self.histogram.double().cpu()
        distribution = counts / counts.sum(dim=1, keepdim=True)
        entropy = -torch.special.xlogy(distribution, distribution).sum(dim=1)
        usage = (counts > 0).double().mean().item()
        distances: dict[str, float | None] = {}
        not_measured: dict[str, str] = {}
        for metric in self.frechet:
            found, reasons = metric.compute()
            distances |= found
            not_measured |= reasons
        few = (
            f"Fréchet distances of {count} images are biased upwards; published ones are of 50,000"
        )
        return {
            "psnr": means.pop("psnr"),
            "psnr_pooled": pooled,
            **means,
            **distances,
            "codebook_usage": usage,
            "perplexity": entropy.exp().mean().item(),
            "entropy_bits": (entropy / torch.tensor(2.0).log()).mean().item(),
            "dead_codes": int((counts == 0).sum()),
            "dead_share": 1 - usage,
            "num_images": count,
            "codebook_size": self.codebook_size,
            "ssim_variant": f"{self.protocol.ssim_window}, data range 1",
            "not_measured": not_measured,
            "notes": [few] if distances and count < FEW_IMAGES else [],
        }
