"""Protocols: each rule against its definition."""

import numpy as np
import pytest
import torch
from PIL import Image

from vqrae.eval.metrics import ReconstructionMetrics
from vqrae.eval.protocols import PROTOCOLS, RESIZES, Protocol, get_protocol, resize_picture, round_levels, ssim


def naive_ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """scikit-image's definition, window by window: 7 x 7, uniform, sample covariance, mean over channels."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for x, y in zip(a, b, strict=True):
        for i in range(x.shape[0] - 6):
            for j in range(x.shape[1] - 6):
                p, q = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
                (var_p, cov), (_, var_q) = np.cov(p, q)
                mean_p, mean_q = p.mean(), q.mean()
                top = (2 * mean_p * mean_q + c1) * (2 * cov + c2)
                values.append(top / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_uniform_ssim_is_that_of_scikit_image(data_range: float) -> None:
    rng = np.random.default_rng(0)
    a = rng.random((1, 3, 12, 10))
    b = (a + 0.2 * rng.normal(size=a.shape)).clip(0, 1)
    ours = ssim(torch.from_numpy(a), torch.from_numpy(b), "uniform_7", data_range)
    assert ours.item() == pytest.approx(naive_ssim(a[0], b[0], data_range), rel=1e-9)


def test_a_wider_data_range_inflates_and_never_takes_the_name() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    copies = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    values = {}
    for name in ("titok", "vgt"):
        metrics = ReconstructionMetrics(8, protocol=get_protocol(name))
        metrics.update(images, copies, torch.zeros(2, 4, dtype=torch.int64))
        values[name] = metrics.compute()
    assert "ssim_range_2" not in values["titok"]
    assert values["vgt"]["ssim_range_2"] > values["vgt"]["ssim"]


def test_rounding_and_truncation() -> None:
    levels = torch.arange(256) / 255
    for rule in ("round", "truncate"):
        assert torch.equal((round_levels(levels, rule) * 255).round(), torch.arange(256).float())  # whole levels survive
    almost = torch.tensor([0.999, 1.2, -0.1])
    assert (round_levels(almost, "round") * 255).tolist() == pytest.approx([255, 255, 0])
    assert (round_levels(almost, "truncate") * 255).tolist() == pytest.approx([254, 255, 0])
    assert round_levels(almost, "none").tolist() == pytest.approx([0.999, 1, 0])


@pytest.mark.parametrize("resize", list(RESIZES))
@pytest.mark.parametrize("size", [(300, 200), (90, 140), (40, 40), (64, 65)])
def test_every_resize_gives_the_square(resize: str, size: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[None, :, None], (size[1], size[0], 3)).copy())
    resized = np.asarray(resize_picture(picture, 64, resize), dtype=int)  # type: ignore[arg-type]
    assert resized.shape == (64, 64, 3)
    assert (np.diff(resized[0, :, 0]) >= 0).all()
    middle = (resized[:, 31, 0] + resized[:, 32, 0]) / 2
    assert np.abs(middle - 127.5).max() <= 4  # centred
    full = resized[0, -1, 0] - resized[0, 0, 0] > 240
    assert full == (resize == "bicubic_squash" or size[0] <= size[1])


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for resize in RESIZES:
        assert np.array_equal(np.asarray(resize_picture(noise, 64, resize)), np.asarray(noise))


@pytest.mark.parametrize(("score_size", "psnr"), [(None, 6.02), (16, 100.0)])
def test_score_size_is_that_of_the_comparison(score_size: int | None, psnr: float) -> None:
    """Checks of 1 px beside their mean: half a level of white away, but the same when both are halved."""
    checks = (torch.arange(32)[:, None] + torch.arange(32)[None]) % 2
    images, flat = checks.float().expand(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    metrics = ReconstructionMetrics(8, protocol=Protocol(rounding="none", score_size=score_size))
    metrics.update(images, flat, torch.zeros(1, 4, dtype=torch.int64))
    assert metrics.compute()["psnr"] == pytest.approx(psnr, abs=0.01)


def test_another_size_of_the_reconstruction_is_resized() -> None:
    metrics = ReconstructionMetrics(8)
    metrics.update(torch.full((1, 3, 32, 32), 0.4), torch.full((1, 3, 40, 40), 0.4), torch.zeros(1, 4, dtype=torch.int64))
    assert metrics.compute()["psnr"] == pytest.approx(100)


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="titok"):
        get_protocol("titoc")
    assert PROTOCOLS["standard"] == Protocol()
