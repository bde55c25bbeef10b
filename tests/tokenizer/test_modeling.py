"""The four calls of the tokenizer, its folder, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from vqrae.common.images import image_to_tensor, resize_and_crop, tensor_to_image
from vqrae.tokenizer.codebook import code_space, initialize_codebook, measure_in_pixels
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.quantizers.registry import QUANTIZERS
from vqrae.tokenizer.vit_decoder import DCTBasis

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{name: {"quantizer": name} for name in QUANTIZERS},
    "fsq": {"quantizer": "fsq", "codebook_dim": 2, "quantizer_options": {"levels": [8, 8]}},
    "mcq": {"quantizer": "mcq", "num_codebooks": 4, "projection": "attention"},
    "rvq": {"quantizer": "rvq", "num_codebooks": 2},
    "internvit": {"encoder": "internvit", "feature_norm": "standardize"},
    "layernorm": {"feature_norm": "layernorm", "feature_tap": "last_hidden_state"},
    "dct": {"output_basis": "dct"},  # no weight, and not lost on loading
    "upscaled": {"encoder": "internvit", "output_patch_size": 16},
}


def images_for(model: VQRAEModel, count: int = 3) -> torch.Tensor:
    size = model.config.image_size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def reload(model: VQRAEModel, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder)
    options["attn_implementation"] = model.config._attn_implementation
    return AutoModel.from_pretrained(folder, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_decode_of_encode_is_the_reconstruction(
    name: str, make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    """Bit for bit, also from a folder that is loaded by its configuration alone."""
    model = make_tokenizer(**CONFIGURATIONS[name])
    images = images_for(model, 4)
    if name != "fsq":
        initialize_codebook(model, images)
    output = model(images)
    assert output.codes.unique().numel() > 1
    assert torch.equal(model.encode(images), output.codes)
    assert torch.equal(model.decode(output.codes), output.reconstruction)
    size = model.config.output_size
    assert output.reconstruction.shape == (4, 3, size, size)
    assert size == (4 * 16 if name == "upscaled" else model.config.image_size)
    assert 0 <= output.reconstruction.min() <= output.reconstruction.max() <= 1
    several = model.config.code_shape[1:]
    assert output.codes.shape == (4, model.config.grid_size**2, *several)
    width = model.config.codebook_dim // (4 if name == "mcq" else 1)
    assert model.code_vectors().shape == (*several, 64, width)
    assert torch.equal(model.quantized_features(images), output.quantized_features)
    with torch.autocast("cpu", torch.bfloat16):  # which projection and quantizer leave
        projected = model.project(output.features)
        assert torch.equal(model.quantizer(projected).codes, output.codes)
    loaded = reload(model, tmp_path)
    assert isinstance(loaded, VQRAEModel)
    assert torch.equal(loaded(images).reconstruction, output.reconstruction)
    assert torch.equal(loaded.decode(output.codes), output.reconstruction)


@torch.no_grad()
def test_features_are_the_encoders_tap(tokenizer: VQRAEModel) -> None:
    images = images_for(tokenizer)
    states = tokenizer.encoder(tokenizer.normalize(images), output_hidden_states=True)
    features = tokenizer.encode_features(images)
    assert features.shape[1:] == (tokenizer.config.grid_size**2, tokenizer.config.feature_dim)
    assert torch.equal(features, states.hidden_states[-1][:, -features.shape[1] :])


@torch.no_grad()
def test_the_two_taps_differ_by_the_last_norm_of_siglip(
    make_tokenizer: Callable[..., VQRAEModel],
) -> None:
    before, after = make_tokenizer(), make_tokenizer(feature_tap="last_hidden_state")
    images = images_for(before)
    expected = before.encoder.post_layernorm(before.encode_features(images))
    torch.testing.assert_close(after.encode_features(images), expected)
    assert not torch.allclose(before.encode_features(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("quantizer", ["simvq", "l2_vq"])
def test_bypass_decodes_the_features_in_code_space(
    quantizer: str, make_tokenizer: Callable[..., VQRAEModel]
) -> None:
    model = make_tokenizer(quantizer=quantizer)
    images = images_for(model)
    projected = model.project(model.encode_features(images))
    if quantizer == "l2_vq":
        projected = nn.functional.normalize(projected, dim=-1)
    decoded = model.decoder(model.out_proj(projected))
    bypassed = model(images, bypass=True)
    expected = (decoded * model.image_std + model.image_mean).clamp(0, 1)
    torch.testing.assert_close(bypassed.reconstruction, expected)
    assert torch.equal(bypassed.codes, model.encode(images))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_reaches_an_encoder_that_is_not_frozen(
    frozen: bool, tokenizer: VQRAEModel
) -> None:
    tokenizer.train().encoder.requires_grad_(not frozen)
    tokenizer(images_for(tokenizer)).reconstruction.square().mean().backward()
    first = next(iter(tokenizer.encoder.embeddings.parameters()))
    assert (first.grad is None) == frozen
    assert sum(weight.grad.abs().sum() for weight in tokenizer.in_proj.parameters()) > 0


def test_cosine_basis_is_invertible() -> None:
    basis = DCTBasis(8)
    torch.testing.assert_close(basis.basis @ basis.basis.T, torch.eye(8), atol=1e-6, rtol=0)
    flat = torch.zeros(1, 3, 8, 8)
    flat[..., 0, 0] = 1
    assert basis(flat).std() < 1e-6  # the first coefficient is the mean of the patch


# ---- the folder


@pytest.mark.parametrize("encoder", ["siglip", "internvit"])
def test_image_processor_prepares_images_as_the_package_does(
    encoder: str, make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    imagenet = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
    model = make_tokenizer(encoder, **(imagenet if encoder == "internvit" else {}))
    model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = tensor_to_image(images_for(model)[0])
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(model.normalize(image_to_tensor(image)), found, atol=1e-6, rtol=0)
    noise = tensor_to_image(torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)))
    for size in ((120, 80), (65, 190), (40, 50)):
        found = processor(noise.resize(size), return_tensors="pt")["pixel_values"][0]
        cropped = resize_and_crop(noise.resize(size), model.config.image_size)
        # Where sides do not divide, half a pixel of shift.
        difference = (found - model.normalize(image_to_tensor(cropped))) * model.image_std
        assert difference.abs().mean() < 0.03


@torch.no_grad()
def test_a_gaussian_start_has_the_features_moments(
    make_tokenizer: Callable[..., VQRAEModel],
) -> None:
    model = make_tokenizer(quantizer="simvq", codebook_size=1024)
    images = images_for(model, 64)
    initialize_codebook(model, images, start="gaussian")
    figures = code_space(model, model.encode_features(images))
    assert figures["code_spread"] == pytest.approx(1, abs=0.1)
    assert figures["code_offset"] < 0.1
    assert figures["code_rank"] == pytest.approx(figures["feature_rank"], rel=0.2)


@torch.no_grad()
def test_the_log_says_where_the_codes_are(make_tokenizer: Callable[..., VQRAEModel]) -> None:
    model = make_tokenizer(quantizer="vq")
    features = model.encode_features(images_for(model, 16)).flatten(0, 1)[None, :64]
    points = model.project(features)[0]
    model.quantizer.codebook.copy_(points.mean(0) + 2 * (points - points.mean(0)))
    spread = (points - points.mean(0)).norm(dim=1).square().mean().sqrt()
    variances = torch.linalg.svdvals(points - points.mean(0)).square()
    rank = variances.sum().square() / variances.square().sum()
    figures = code_space(model, features)
    assert figures["code_rank"] == pytest.approx(rank.item(), rel=1e-3)
    assert figures["feature_rank"] == pytest.approx(rank.item(), rel=1e-3)
    assert figures["code_spread"] == pytest.approx(2, rel=1e-4)
    assert figures["feature_spread"] == pytest.approx(spread.item(), rel=1e-4)
    error = model.quantizer(points[None]).losses["codebook_loss"] * points.shape[1] / spread**2
    assert figures["code_error"] == pytest.approx(error.item(), rel=1e-4)
    assert figures["code_offset"] == pytest.approx(0, abs=1e-3)
    model.quantizer.codebook += 3 * spread / points.shape[1] ** 0.5
    assert code_space(model, features)["code_offset"] == pytest.approx(3, rel=1e-3)
    assert code_space(make_tokenizer(**CONFIGURATIONS["mcq"]), features) == {}


@torch.no_grad()
def test_a_half_precision_model_keeps_its_codes(tokenizer: VQRAEModel, tmp_path: Path) -> None:
    initialize_codebook(tokenizer, images_for(tokenizer, 8))
    half = reload(tokenizer, tmp_path, dtype=torch.bfloat16)
    images = images_for(tokenizer)
    assert half.encode_features(images).dtype == torch.bfloat16
    assert torch.equal(half.encode(images.bfloat16().float()), half.encode(images.bfloat16()))
    assert (half.encode(images) == tokenizer.encode(images)).float().mean() > 0.8
    assert torch.equal(half.decode(half.encode(images)), half(images).reconstruction)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, expected torch\.float32.*dtype="):
        tokenizer.bfloat16().encode(images)


@pytest.mark.parametrize("wrong", ["lacks weights", "has weights unknown", "not finite"])
@pytest.mark.parametrize("kind", [VQRAEModel, AutoModel])
def test_a_folder_with_wrong_weights_is_refused(
    wrong: str, kind: Any, make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if wrong == "lacks weights":
        del weights["decoder.head.weight"], weights["out_proj.bias"]
    elif wrong == "has weights unknown":
        weights["decoder.neck.weight"] = torch.zeros(3)
    else:
        weights["in_proj.bias"][1] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{wrong}"):
        kind.from_pretrained(tmp_path)


# ---- what is refused


@torch.no_grad()
@pytest.mark.parametrize("name", ["uint8", "0 to 255", "-1 to 1", "NaN"])
def test_images_outside_their_range_are_refused(name: str, tokenizer: VQRAEModel) -> None:
    images = images_for(tokenizer)
    wrong = {
        "uint8": (images * 255).byte(),
        "0 to 255": images * 255,
        "-1 to 1": images * 2 - 1,
        "NaN": images * float("nan"),
    }[name]
    for call in (tokenizer.encode, tokenizer.encode_features, tokenizer):
        with pytest.raises(ValueError, match=r"expected .*\[0, 1\]: divide"):
            call(wrong)
    assert tokenizer.encode(images.round()).shape[0] == len(images)  # 0 and 1 belong to it


def test_wrong_shapes_and_codes_are_named(tokenizer: VQRAEModel) -> None:
    size = tokenizer.config.image_size
    with pytest.raises(ValueError, match=rf"expected \(B, 3, {size}, {size}\)"):
        tokenizer.encode(torch.rand(1, 3, size, size + 1))
    expected = tokenizer.config.code_shape
    with pytest.raises(ValueError, match="expected 0 to 63"):
        tokenizer.decode(torch.full((1, *expected), 64))
    listed = ", ".join(map(str, expected))
    for shape in ((1, 3), (1, expected[0], 8)):
        with pytest.raises(ValueError, match=rf"got codes of shape .*expected \(B, {listed}\)"):
            tokenizer.decode(torch.zeros(shape, dtype=torch.long))


# ---- the start of a training


def test_too_few_images_for_the_codebook_are_refused(tokenizer: VQRAEModel) -> None:
    tokenizer.config.codebook_size = 1024
    needed = -(-1024 // tokenizer.config.grid_size**2)
    with pytest.raises(ValueError, match=rf"at least {needed} images.*model\.codebook_size"):
        initialize_codebook(tokenizer, images_for(tokenizer))


@pytest.mark.parametrize("tokenizer", ["siglip", "internvit"], indirect=True)
def test_code_space_measured_in_pixels(tokenizer: VQRAEModel) -> None:
    """The autoencoder stays the same function, and distances of features become those of images."""
    images = images_for(tokenizer, 8)
    half = tokenizer.config.codebook_dim // 2
    with torch.no_grad():  # half of the dimensions count ten times too much
        tokenizer.in_proj.weight[:half] *= 10
        tokenizer.out_proj.weight[:, :half] /= 10
        before = tokenizer(images, bypass=True).reconstruction
        spread = tokenizer.project(tokenizer.encode_features(images)).var((0, 1)).sum()
    measure_in_pixels(tokenizer, images, num_probes=64)
    with torch.no_grad():
        features = tokenizer.project(tokenizer.encode_features(images))
        after = tokenizer(images, bypass=True).reconstruction
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
        torch.testing.assert_close(features.var((0, 1)).sum(), spread, rtol=1e-3, atol=0)
        at_rest = tokenizer.decode_pixels(tokenizer.out_proj(features))
        generator = torch.Generator().manual_seed(0)
        lengths = []
        for _ in range(16):  # how far images move with one feature, whatever its direction
            direction = torch.randn(features.shape[-1], generator=generator)
            shifted = features.clone()
            shifted[:, 0] += 1e-2 * features.std() * direction / direction.norm()
            lengths.append((tokenizer.decode_pixels(tokenizer.out_proj(shifted)) - at_rest).norm())
    assert torch.stack(lengths).std() < 0.3 * torch.stack(lengths).mean()
