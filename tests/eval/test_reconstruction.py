"""Reconstruction metrics against their definitions, and the command."""

import json
from pathlib import Path

import pytest
import torch

from vqrae.data.scenes import SceneDataset
from vqrae.eval import reconstruction
from vqrae.eval.reconstruction import ReconstructionMetrics, evaluate_reconstruction
from vqrae.tokenizer import VQRAEModel

CODES = torch.zeros(1, 4, dtype=torch.int64)


def measure(images: torch.Tensor, copies: torch.Tensor) -> dict:
    metrics = ReconstructionMetrics(8)
    metrics.update(images, copies, CODES.expand(len(images), -1))
    return metrics.compute()


def test_psnr_is_the_mean_over_pictures() -> None:
    images = torch.full((2, 3, 32, 32), 100 / 255)
    copies = images.clone()
    copies[0] += 51 / 255  # 20 log10(5) = 13.98 dB; the other is exact and counts 100
    assert measure(images, copies)["psnr"] == pytest.approx((13.979 + 100) / 2, abs=1e-2)


def test_pictures_are_clamped_and_rounded_first() -> None:
    images = torch.ones(1, 3, 32, 32)
    assert measure(images, images + 0.3)["psnr"] == pytest.approx(100)
    assert measure(images, images - 0.4 / 255)["psnr"] == pytest.approx(100)
    assert measure(images, images - 0.6 / 255)["psnr"] == pytest.approx(48.13, abs=1e-2)


def test_ssim_is_one_for_copies_and_of_range_one() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32)
    assert measure(images, images)["ssim"] == pytest.approx(1)
    # Constant pictures leave the luminance term: (2ab + c) / (a^2 + b^2 + c) with c = (0.01 x range)^2.
    a, b, c = 51 / 255, 102 / 255, 1e-4
    expected = (2 * a * b + c) / (a * a + b * b + c)
    constant = measure(torch.full((1, 3, 32, 32), a), torch.full((1, 3, 32, 32), b))
    assert constant["ssim"] == pytest.approx(expected, abs=1e-4)


def test_codes_are_counted_over_the_whole_set() -> None:
    images, metrics = torch.zeros(1, 3, 16, 16), ReconstructionMetrics(8)
    for codes in ([0, 0, 1, 1], [2, 2, 3, 3]):
        metrics.update(images, images, torch.tensor([codes]))
    values = metrics.compute()
    assert (values["codebook_usage"], values["dead_codes"]) == (0.5, 4)
    assert values["perplexity"] == pytest.approx(4)
    assert values["entropy_bits"] == pytest.approx(2)
    assert metrics.histogram.tolist() == [[2, 2, 2, 2, 0, 0, 0, 0]]


def test_several_codebooks_are_counted_apart() -> None:
    images, metrics = torch.zeros(1, 3, 16, 16), ReconstructionMetrics(4, num_codebooks=2)
    metrics.update(images, images, torch.tensor([[[0, 3], [1, 3]]]))
    values = metrics.compute()
    assert metrics.histogram.tolist() == [[1, 1, 0, 0], [0, 0, 0, 2]]
    assert values["codebook_usage"] == pytest.approx(3 / 8)
    assert values["perplexity"] == pytest.approx(1.5)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        ReconstructionMetrics(8).compute()
    with pytest.raises(ValueError, match="expected alike"):
        ReconstructionMetrics(8).update(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 8, 8), CODES)


def test_batches_do_not_matter(tokenizer_folder: Path) -> None:
    model, scenes = VQRAEModel.from_pretrained(tokenizer_folder), SceneDataset("validation", 10)
    one, many = (evaluate_reconstruction(model, scenes, batch_size=size, num_images=7) for size in (1, 4))
    for key, value in one.metrics.items():
        assert value == (pytest.approx(many.metrics[key], rel=1e-4) if isinstance(value, float) else many.metrics[key]), key
    assert one.metrics["num_images"] == 7
    assert torch.equal(one.originals[2], scenes.image(2).float() / 255)
    assert one.copies.shape == one.originals.shape == (7, 3, 64, 64)
    with pytest.raises(ValueError, match="num_images=11"):
        evaluate_reconstruction(model, scenes, num_images=11)


def test_command(tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores" / "reconstruction.json"
    reconstruction.main([f"model={tokenizer_folder}", "num_images=5", "batch_size=2", f"output={output}"])
    values = json.loads(output.read_text())
    assert values["num_images"] == 5
    assert {"psnr", "ssim", "codebook_usage", "perplexity", "tokenizer", "data"} <= set(values)
    assert output.with_suffix(".png").is_file()
    assert "psnr" in capsys.readouterr().out
