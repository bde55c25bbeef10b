"""Reconstruction metrics against their definitions, and the command."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from vqrae.common.images import save_image, tensor_to_image
from vqrae.data.samples import TooManyBrokenSamples
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.eval.reconstruction import compare, networks
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.eval.reconstruction.evaluate import evaluate_reconstruction
from vqrae.eval.reconstruction.metrics import ReconstructionMetrics
from vqrae.tokenizer.modeling import VQRAEModel

CODES = torch.zeros(1, 4, dtype=torch.int64)


def measure(images: torch.Tensor, copies: torch.Tensor) -> dict[str, Any]:
    metrics = ReconstructionMetrics(8)
    metrics.update(images, copies, CODES.expand(len(images), -1))
    return metrics.compute()


def test_psnr_is_the_mean_over_images() -> None:
    images = torch.full((2, 3, 32, 32), 100 / 255)
    copies = images.clone()
    copies[0] += 51 / 255  # 20 log10(5) = 13.98 dB; the other is exact and counts 100
    values = measure(images, copies)
    assert values["psnr"] == pytest.approx((13.979 + 100) / 2, abs=1e-2)
    assert values["psnr_pooled"] == pytest.approx(13.979 + 3.01, abs=1e-2)  # half the squared error


@pytest.mark.parametrize(("offset", "psnr"), [(0.3, 100), (-0.4 / 255, 100), (-0.6 / 255, 48.13)])
def test_images_are_clamped_and_rounded_first(offset: float, psnr: float) -> None:
    images = torch.ones(1, 3, 32, 32)
    assert measure(images, images + offset)["psnr"] == pytest.approx(psnr, abs=1e-2)


def test_codes_are_counted_over_the_whole_set() -> None:
    images, metrics = torch.zeros(1, 3, 16, 16), ReconstructionMetrics(8)
    for codes in ([0, 0, 1, 1], [2, 2, 3, 3]):
        metrics.update(images, images, torch.tensor([codes]))
    values = metrics.compute()
    assert (values["codebook_usage"], values["dead_codes"]) == (0.5, 4)
    assert values["perplexity"] == pytest.approx(4)
    assert values["entropy_bits"] == pytest.approx(2)
    assert metrics.usage.counts.tolist() == [[2, 2, 2, 2, 0, 0, 0, 0]]
    assert "codebook_usage_min" not in values
    metrics = ReconstructionMetrics(8, num_codebooks=2)
    metrics.update(images, images, torch.tensor([[[0, 0], [1, 0], [2, 0], [3, 1]]]))
    values = metrics.compute()
    assert metrics.usage.counts.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0, 0, 0]]
    assert (values["codebook_usage"], values["codebook_usage_min"]) == (3 / 8, 2 / 8)
    assert (values["dead_codes"], values["dead_share"]) == (10, 5 / 8)
    second = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert values["entropy_bits"] == pytest.approx(2 + second)
    assert values["perplexity"] == pytest.approx((4 + 2**second) / 2)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no images"):
        ReconstructionMetrics(8).compute()
    with pytest.raises(ValueError, match="psnr, squared_error, ssim that are not finite"):
        measure(torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), float("nan")))


def test_batches_do_not_matter(tokenizer_folder: Path) -> None:
    model, scenes = VQRAEModel.from_pretrained(tokenizer_folder), SceneDataset("validation", 10)
    one, images, copies = evaluate_reconstruction(model, scenes, batch_size=1, num_images=7)
    many, *_ = evaluate_reconstruction(model, scenes, batch_size=4, num_images=7)
    for key, value in one.items():
        assert many[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert one["num_images"] == 7
    assert torch.equal(images[2], scenes.image(2).float() / 255)
    assert copies.shape == images.shape == (7, 3, 64, 64)
    with pytest.raises(ValueError, match="num_images=11"):
        evaluate_reconstruction(model, scenes, num_images=11)


# ---- the command


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch; returns where a file would be."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def run_directory(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A run directory with both stages; the tokenizers are the same."""
    run = tmp_path / "run"
    for place in (run / "stage1", run / "stage2", run):
        place.mkdir(exist_ok=True, parents=True)
        (place / "model").symlink_to(tokenizer_folder)
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images of scenes, wider than high, and a broken one among them."""
    folder = tmp_path / "images"
    scenes = SceneDataset("validation", 11)
    for i in range(11):
        image = scenes.image(i).float() / 255
        wide = torch.cat([image, image[..., :32]], dim=2)
        save_image(tensor_to_image(wide), folder / f"{i:02d}.png")
    (folder / "04.png").write_bytes(b"no image")
    return folder


def score(output: Path, *arguments: str) -> dict:
    reconstruction.main([*arguments, f"output={output}"])
    return json.loads(output.read_text())


def test_scores_are_kept_and_others_refused(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores" / "reconstruction.json"
    arguments = [f"model={tokenizer_folder}", "num_images=5", "batch_size=2"]
    values = score(output, *arguments)
    assert (values["num_images"], values["split"]) == (5, "validation")
    assert {"psnr", "ssim", "codebook_usage", "perplexity", "tokenizer", "data"} <= set(values)
    assert values["protocol"]["rounding"] == "round"
    assert output.with_suffix(".png").is_file()
    monkeypatch.setattr(reconstruction, "evaluate_reconstruction", None)
    assert score(output, *arguments) == values
    with pytest.raises(ValueError, match="requested_images 5 -> 6"):
        score(output, f"model={tokenizer_folder}", "num_images=6")


def test_without_weights_all_other_metrics_are_taken(
    run_directory: Path, tmp_path: Path, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.json"
    values = score(output, f"model={run_directory}", "num_images=5", "frechet=[inception, encoder]")
    assert values["rfid"] is values["inception_score"] is values["lpips_vgg"] is None
    assert values["frechet_encoder"] > 0
    assert values["psnr"] > 0
    missing = {"rfid": networks.INCEPTION_FILE, "lpips_vgg": networks.LPIPS_FILES["vgg"]}
    for metric, name in missing.items():
        assert f"to {no_weights / name}" in values["not_measured"][metric]
    assert "| rfid | not measured: no weights" in output.with_suffix(".md").read_text()
    assert "| psnr | " in capsys.readouterr().out


def test_a_lone_tokenizer_has_no_original_encoder(tokenizer_folder: Path, tmp_path: Path) -> None:
    arguments = [f"model={tokenizer_folder}", "num_images=3", "frechet=[encoder]"]
    values = score(tmp_path / "a.json", *arguments)
    assert "give original_encoder=" in values["not_measured"]["frechet_encoder"]
    values = score(tmp_path / "b.json", *arguments, f"original_encoder={tokenizer_folder}")
    assert values["frechet_encoder"] > 0


def test_one_image_has_no_distance_but_all_other_scores(
    run_directory: Path, tmp_path: Path
) -> None:
    arguments = [f"model={run_directory}", "num_images=1", "frechet=[encoder]"]
    values = score(tmp_path / "scores.json", *arguments, f"reference={tmp_path / 'reference'}")
    assert values["frechet_encoder"] is None
    assert "features of 1 images, expected at least 2" in values["not_measured"]["frechet_encoder"]
    assert values["psnr"] > 0
    assert not (tmp_path / "reference").exists()


def test_all_images_of_a_folder_are_scored_and_broken_ones_are_left_out(
    tokenizer_folder: Path, folder: Path, tmp_path: Path
) -> None:
    arguments = [f"model={tokenizer_folder}", f"data={folder}", "batch_size=4"]
    values = score(tmp_path / "all.json", *arguments, "protocol=llamagen", "num_workers=1")
    assert (values["num_images"], values["broken_images"], values["split"]) == (10, 1, "all")
    assert values["ssim_range_2"] > values["ssim"]
    (folder / "04.png").unlink()
    sound = score(tmp_path / "sound.json", *arguments, "protocol=llamagen")
    assert sound["psnr"] == pytest.approx(values["psnr"], rel=1e-5)
    assert score(tmp_path / "part.json", *arguments, "split=validation")["num_images"] == 1
    with pytest.raises(ValueError, match="scenes have no end"):
        score(tmp_path / "endless.json", f"model={tokenizer_folder}", "split=all")
    for i in range(6):
        (folder / f"0{i}.png").write_bytes(b"no image")
    with pytest.raises(TooManyBrokenSamples, match="6 of the 11 samples read so far are broken"):
        score(tmp_path / "broken.json", *arguments, "batch_size=16")


def test_kept_references_give_the_same_distance_and_refuse_others(
    run_directory: Path, folder: Path, tmp_path: Path
) -> None:
    arguments = [f"model={run_directory}", f"data={folder}", "frechet=[encoder]"]
    arguments.append(f"reference={tmp_path / 'reference'}")
    first = score(tmp_path / "a.json", *arguments)["frechet_encoder"]
    assert (tmp_path / "reference" / "encoder.npz").is_file()
    again = score(tmp_path / "b.json", *arguments)["frechet_encoder"]
    assert again == pytest.approx(first, rel=1e-6)
    with pytest.raises(ValueError, match="requested_images 11 -> 7"):
        score(tmp_path / "c.json", *arguments, "num_images=7")
    with pytest.raises(ValueError, match=r"protocol .*standard.* -> .*vgt"):
        score(tmp_path / "c.json", *arguments, "protocol=vgt")


# ---- networks


def test_weights_are_what_their_name_promises(no_weights: Path) -> None:
    no_weights.mkdir(parents=True)
    (no_weights / networks.INCEPTION_FILE).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"SHA-256 starts with .*expected 6726825d"):
        networks.Inception()
    with pytest.raises(ValueError, match="inception_weights: nowhere is not a file"):
        networks.Inception("nowhere")


def test_inception_is_that_of_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Random weights in the right file: the path from file to number is the real one."""
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: {}, raising=False)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        whole = fidelity.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    monkeypatch.setattr(networks, "find_weights", lambda name, url, key, path=None: Path(path))
    torch.save(whole.state_dict(), tmp_path / "inception.pth")
    network = networks.Inception(str(tmp_path / "inception.pth"))
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    for ours, theirs in zip(network(pixels.float() / 255), whole(pixels), strict=True):
        assert torch.equal(ours, theirs)


def test_tiles_and_their_join_are_inverse() -> None:
    images = torch.rand(2, 3, 16, 16)
    tiles = compare.retile(images, 8)
    assert tiles.shape == (8, 3, 8, 8)
    assert torch.equal(tiles[1], images[0, :, :8, 8:])
    assert torch.equal(compare.retile(tiles, 16), images)
    with pytest.raises(ValueError, match="16 and 12 pixels, expected a multiple"):
        compare.retile(images, 12)


def test_more_bytes_make_a_better_copy() -> None:
    images = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), 64, mode="bicubic").clamp(0, 1)
    for name in ("JPEG", "WEBP"):
        copies = [compare.by_format(name, count)(images)[0] for count in (60, 600)]
        coarse, fine = ((copy - images).square().mean() for copy in copies)
        assert fine < 0.5 * coarse
    patches, codes = compare.by_patches(compare.retile(images, 8).flatten(1), 8)(images)
    assert torch.equal(patches, images)
    assert codes.tolist() == list(range(64))
