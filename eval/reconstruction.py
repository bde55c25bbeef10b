"""How much of a picture survives the codes: PSNR, SSIM and codebook usage.

    python -m vqrae.eval.reconstruction model=runs/tokenizer data=scenes num_images=1000 output=reconstruction.json

Both pictures are clamped and rounded to 8 bits once, which is what a saved reconstruction holds; then metrics are taken per
picture in [0, 1] and averaged. SSIM is the original one (Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5) at data
range 1, which is neither scikit-image's 7 x 7 default nor the inflated range 2 of some published code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.functional.image import structural_similarity_index_measure

from vqrae.common.checkpoints import resolve_model
from vqrae.common.cli import parse_arguments, progress_line
from vqrae.common.files import weights_fingerprint, write_json
from vqrae.common.pictures import picture_grid, save_picture, tensor_to_uint8
from vqrae.data.sources import open_images
from vqrae.tokenizer import VQRAEModel

SSIM_VARIANT = "11x11 Gaussian window, sigma 1.5, data range 1.0"
MIN_SQUARED_ERROR = 1e-10  # an exact copy counts 100 dB
EXAMPLES = 16


class ReconstructionMetrics:
    """Streaming metrics over a set of pictures.

    Args:
        codebook_size: K.
        num_codebooks: G; with several, shares and perplexity are means over the codebooks.
    """

    def __init__(self, codebook_size: int, num_codebooks: int = 1) -> None:
        self.codebook_size = codebook_size
        self.histogram = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64)
        self._psnr: list[Tensor] = []
        self._ssim: list[Tensor] = []

    def update(self, images: Tensor, reconstruction: Tensor, codes: Tensor) -> None:
        """Add a batch.

        Args:
            images, reconstruction: (B, 3, H, W) in [0, 1]; what exceeds the range is clamped.
            codes: (B, N), or (B, N, G) with several codebooks.

        Raises:
            ValueError: when the two are not of one shape.
        """
        if images.shape != reconstruction.shape:
            raise ValueError(
                f"got images {tuple(images.shape)} and reconstruction {tuple(reconstruction.shape)}, expected alike"
            )
        target, copy = (tensor_to_uint8(batch).float() / 255 for batch in (images, reconstruction))
        error = (target - copy).square().flatten(1).mean(dim=1).clamp(min=MIN_SQUARED_ERROR)
        self._psnr.append((-10 * error.log10()).cpu())
        ssim = structural_similarity_index_measure(copy, target, kernel_size=11, sigma=1.5, reduction="none", data_range=1.0)
        self._ssim.append(torch.as_tensor(ssim).reshape(-1).cpu())
        for counts, column in zip(self.histogram, codes.reshape(-1, len(self.histogram)).T.cpu(), strict=True):
            counts += torch.bincount(column, minlength=self.codebook_size)

    def compute(self) -> dict[str, Any]:
        """All metrics over everything that was added.

        Returns:
            psnr (dB) and ssim, means over pictures; codebook_usage, the share of the K codes that any picture used;
            perplexity and entropy_bits of the codes; dead_codes; num_images, codebook_size, ssim_variant.

        Raises:
            ValueError: when nothing was added.
        """
        if not self._psnr:
            raise ValueError("got no pictures, expected at least one")
        share = self.histogram.double() / self.histogram.sum(dim=1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=1)
        psnr, ssim = torch.cat(self._psnr), torch.cat(self._ssim)
        return {
            "psnr": psnr.mean().item(),
            "ssim": ssim.mean().item(),
            "codebook_usage": (self.histogram > 0).double().mean().item(),
            "perplexity": entropy.exp().mean().item(),
            "entropy_bits": (entropy / torch.tensor(2.0).log()).mean().item(),
            "dead_codes": int((self.histogram == 0).sum()),
            "num_images": len(psnr),
            "codebook_size": self.codebook_size,
            "ssim_variant": SSIM_VARIANT,
        }


@dataclass(frozen=True)
class Reconstructions:
    """Metrics with usage counts (G, K), and the first pictures beside their copies, (M, 3, H, W) in [0, 1]."""

    metrics: dict[str, Any]
    histogram: Tensor
    originals: Tensor
    copies: Tensor


@torch.inference_mode()
def evaluate_reconstruction(
    model: VQRAEModel,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    num_images: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstructions:
    """Encode and decode the first `num_images` (or all) pictures of a data set of {"image": uint8 (3, H, W)}.

    Args:
        progress: called with (pictures done, pictures in all).

    Raises:
        ValueError: when the data set holds fewer pictures than asked for.
    """
    model = model.eval()
    available: int = len(dataset)  # type: ignore[arg-type]  # every source of ours has a length
    total = available if num_images is None else num_images
    if not 0 < total <= available:
        raise ValueError(f"got num_images={total}, expected 1 to {available}, the pictures of this data set")
    metrics: ReconstructionMetrics | None = None
    originals, copies, done = [], [], 0
    for batch in DataLoader(Subset(dataset, range(total)), batch_size=batch_size):
        images = batch["image"].to(model.device).float() / 255
        codes = model.encode(images)
        reconstruction = model.decode(codes)
        if metrics is None:
            metrics = ReconstructionMetrics(model.config.codebook_size, codes.shape[2] if codes.ndim == 3 else 1)
        metrics.update(images, reconstruction, codes)
        if done < EXAMPLES:
            originals.append(images[: EXAMPLES - done].cpu())
            copies.append(reconstruction[: EXAMPLES - done].cpu())
        done += len(images)
        if progress is not None:
            progress(done, total)
    assert metrics is not None
    return Reconstructions(metrics.compute(), metrics.histogram, torch.cat(originals), torch.cat(copies))


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Score a tokenizer's reconstructions: PSNR, SSIM, codebook usage."""

    model: str
    """Tokenizer: run directory, checkpoint folder or hub id."""
    output: str
    """JSON file of the scores; a grid of examples (originals above copies) goes beside it as a PNG."""
    data: str = "scenes"
    """Source of pictures: scenes, scenes:emoji, a folder, FILE.jsonl or FILE.tar; its validation split is used."""
    num_images: int = 1000
    """Pictures to score; fewer when the source has fewer."""
    batch_size: int = 32
    """Pictures of one pass."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.batch_size < 1:
            raise ValueError(f"got num_images={self.num_images}, batch_size={self.batch_size}, expected both positive")


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(ReconstructionConfig, argv)
    folder = resolve_model(config.model)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = VQRAEModel.from_pretrained(folder).to(device)
    dataset = open_images(config.data, image_size=model.config.image_size, size=config.num_images, split="validation")
    result = evaluate_reconstruction(model, dataset, batch_size=config.batch_size, progress=progress_line("reconstruction"))
    fingerprint = weights_fingerprint(folder) if Path(folder).is_dir() else config.model
    write_json(config.output, {**result.metrics, "data": config.data, "tokenizer": fingerprint})
    rows = [list(result.originals[:8]), list(result.copies[:8])]
    save_picture(picture_grid(rows, labels=["original", "copy"]), Path(config.output).with_suffix(".png"))
    metrics = result.metrics
    print(
        f"psnr {metrics['psnr']:.2f} dB  ssim {metrics['ssim']:.4f}  codebook usage {metrics['codebook_usage']:.1%}  "
        f"perplexity {metrics['perplexity']:.1f}  ({metrics['num_images']} pictures)  ->  {config.output}"
    )


if __name__ == "__main__":
    main()
