"""Protocols: each rule against its definition, and against the code that it follows."""

import json
import runpy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from vqrae.eval.reconstruction.frechet import FrechetMetric
from vqrae.eval.reconstruction.metrics import ReconstructionMetrics, ssim
from vqrae.eval.reconstruction.protocols import (
    PROTOCOLS,
    Protocol,
    Resize,
    SSIMWindow,
    resize_image,
    round_levels,
)

GOLDEN = Path(__file__).parent / "golden" / "evaluators.json"


def measure(protocol: Protocol, images: torch.Tensor, copies: torch.Tensor, **options: Any) -> dict:
    metrics = ReconstructionMetrics(8, protocol=protocol, **options)
    metrics.update(images, copies, torch.zeros(len(images), 4, dtype=torch.int64))
    return metrics.compute()


def noisy_images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return images, (images + 0.2 * noise).clamp(0, 1)


@pytest.mark.parametrize("name", ["vgt", "titok", "maskbit", "rae"])
def test_protocols_give_the_numbers_of_the_code_that_they_cite(name: str) -> None:
    class Shown(torch.nn.Module):
        name, identity, width, num_classes = "shown", "", 2, 0

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            self.images = images
            return torch.zeros(len(images), 2), None

    expected, network = json.loads(GOLDEN.read_text())[name], Shown()
    images, copies = runpy.run_path(str(GOLDEN.with_suffix(".py")))["images_and_copies"]()
    values = measure(PROTOCOLS[name], images, copies, frechet=[FrechetMetric(network)])
    levels = (network.images.double() * 255).round().sum((1, 2, 3)).tolist()
    # VGT's way to [-1, 1] and back costs one.
    assert levels == pytest.approx(expected.pop("levels"), abs=5)
    assert {key: values[key] for key in expected} == pytest.approx(expected, rel=1e-4)  # of float32


def test_llamagen_rounds() -> None:
    """Its evaluator saves x in [-1, 1] as `127.5 x + 128`, clamped and cut to whole levels."""
    decoded = 2.2 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) - 1.1
    levels = torch.clamp(127.5 * decoded + 128.0, 0, 255).to(torch.uint8)
    ours = round_levels((decoded + 1) / 2, PROTOCOLS["llamagen"].rounding)
    assert torch.equal((ours * 255).round(), levels.float())


# ---- PSNR and SSIM


@pytest.mark.parametrize(
    ("window", "options"),
    [
        ("gaussian_11", {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
        ("uniform_7", {}),
    ],
)
@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_that_of_scikit_image(
    window: SSIMWindow, options: dict[str, Any], data_range: float
) -> None:
    images, copies = (batch.double() for batch in noisy_images())
    theirs = [
        structural_similarity(a, b, channel_axis=0, data_range=data_range, **options)
        for a, b in zip(images.numpy(), copies.numpy(), strict=True)
    ]
    ours = ssim(images, copies, window, data_range)
    assert ours.tolist() == pytest.approx(theirs, rel=1e-12)


def test_padded_ssim_is_that_of_torchmetrics() -> None:
    """RAE's evaluator calls this function, MaskBit's does the same by hand."""
    images, copies = noisy_images()
    theirs = structural_similarity_index_measure(
        copies.double(), images.double(), data_range=1.0, reduction="none"
    )
    ours = ssim(images, copies, "gaussian_11_padded", 1.0)
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-12)  # type: ignore[union-attr]


def test_ssim_needs_one_window() -> None:
    with pytest.raises(ValueError, match="got images of 10 x 16, expected at least 11 pixels"):
        ssim(torch.rand(1, 3, 10, 16), torch.rand(1, 3, 10, 16), "gaussian_11", 1.0)


def test_psnr_is_that_of_scikit_image() -> None:
    images, copies = noisy_images()
    pairs = zip(images.numpy(), copies.numpy(), strict=True)
    theirs = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    values = measure(Protocol(rounding="none"), images, copies)
    assert values["psnr"] == pytest.approx(np.mean(theirs), rel=1e-6)


# ---- sizes and levels


def test_rounding_and_truncation() -> None:
    levels = torch.arange(256) / 255
    for rule in ("round", "truncate"):  # whole levels survive
        assert torch.equal((round_levels(levels, rule) * 255).round(), torch.arange(256).float())
    almost = torch.tensor([0.999, 1.2, -0.1])
    assert (round_levels(almost, "round") * 255).tolist() == pytest.approx([255, 255, 0])
    assert (round_levels(almost, "truncate") * 255).tolist() == pytest.approx([254, 255, 0])
    assert round_levels(almost, "none").tolist() == pytest.approx([0.999, 1, 0])


@pytest.mark.parametrize("resize", get_args(Resize))
@pytest.mark.parametrize("size", [(300, 200), (90, 140), (40, 40), (64, 65), (64, 64)])
def test_every_resize_gives_the_square(resize: Any, size: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (size[1], size[0], 3)).copy())
    resized = np.asarray(resize_image(image, 64, resize), dtype=int)
    if size == (64, 64):
        assert np.array_equal(resized, np.asarray(image))
    assert resized.shape == (64, 64, 3)
    assert (np.diff(resized[0, :, 0]) >= 0).all()
    middle = (resized[:, 31, 0] + resized[:, 32, 0]) / 2
    assert np.abs(middle - 127.5).max() <= 4  # centred
    assert (resized[0, -1, 0] - resized[0, 0, 0] > 240) == (size[0] <= size[1])


@pytest.mark.parametrize(("score_size", "psnr"), [(None, 6.02), (16, 100.0)])
def test_score_size_is_that_of_the_comparison(score_size: int | None, psnr: float) -> None:
    """Checks of 1 px and their mean: half a level of white apart, the same when both are halved."""
    checks = (torch.arange(32)[:, None] + torch.arange(32)[None]) % 2
    images, flat = checks.float().expand(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    values = measure(Protocol(rounding="none", score_size=score_size), images, flat)
    assert values["psnr"] == pytest.approx(psnr, abs=0.01)


def test_another_size_of_the_reconstruction_is_resized() -> None:
    values = measure(Protocol(), torch.full((1, 3, 32, 32), 0.4), torch.full((1, 3, 40, 40), 0.4))
    assert values["psnr"] == pytest.approx(100)
