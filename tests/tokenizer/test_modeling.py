from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from vqrae.common.images import image_to_tensor, resize_and_crop, tensor_to_image
from vqrae.tokenizer.codebook import initialize_codebook, measure_in_pixels
from vqrae.tokenizer.modeling import DCTBasis, VQRAEModel
from vqrae.tokenizer.quantizers.registry import QUANTIZERS


def images_for(model: VQRAEModel, count: int = 3) -> torch.Tensor:
    size = model.config.image_size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("feature_norm", ["none", "layernorm", "standardize"])
def test_decode_of_encode_is_the_reconstruction(tokenizer: VQRAEModel, feature_norm: str) -> None:
    tokenizer.config.feature_norm = feature_norm
    images = images_for(tokenizer)
    output = tokenizer(images)
    assert torch.equal(tokenizer.encode(images), output.codes)
    assert torch.equal(tokenizer.decode(output.codes), output.reconstruction)
    assert output.reconstruction.shape == images.shape
    assert output.reconstruction.min() >= 0
    assert output.reconstruction.max() <= 1


def options_of(quantizer: str) -> dict[str, Any]:
    """A configuration of that quantizer with 64 codes."""
    levels = {"codebook_dim": 2, "quantizer_options": {"levels": [8, 8]}}
    return {"quantizer": quantizer, **(levels if quantizer == "fsq" else {})}


@torch.no_grad()
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_keeps_the_contract(
    quantizer: str, make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    model = make_tokenizer(**options_of(quantizer))
    images = images_for(model)
    if quantizer != "fsq":
        initialize_codebook(model, images)
    output = model(images)
    assert output.codes.unique().numel() > 1
    assert torch.equal(model.encode(images), output.codes)
    assert torch.equal(model.decode(output.codes), output.reconstruction)
    assert model.code_vectors().shape == (64, model.config.codebook_dim)
    model.save_pretrained(tmp_path)
    loaded = VQRAEModel.from_pretrained(
        tmp_path, attn_implementation=model.config._attn_implementation
    ).eval()
    assert torch.equal(loaded(images).reconstruction, output.reconstruction)
    assert torch.equal(loaded.decode(output.codes), output.reconstruction)


@torch.no_grad()
def test_folder_round_trip(tokenizer: VQRAEModel, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    images = images_for(tokenizer)
    loaded = AutoModel.from_pretrained(
        tmp_path, attn_implementation=tokenizer.config._attn_implementation
    )
    assert isinstance(loaded, VQRAEModel)
    assert torch.equal(loaded.eval()(images).reconstruction, tokenizer(images).reconstruction)


@torch.no_grad()
def test_features_are_the_encoders_tap(tokenizer: VQRAEModel) -> None:
    images = images_for(tokenizer)
    pixel_values = tokenizer.normalize(images)
    states = tokenizer.encoder(pixel_values, output_hidden_states=True)
    features = tokenizer.encode_features(images)
    assert features.shape[1:] == (tokenizer.config.grid_size**2, tokenizer.config.feature_dim)
    assert torch.equal(features, states.hidden_states[-1][:, -features.shape[1] :])


@torch.no_grad()
def test_the_two_taps_differ_by_the_last_norm_of_siglip(
    make_tokenizer: Callable[..., VQRAEModel],
) -> None:
    before, behind = make_tokenizer(), make_tokenizer(feature_tap="last_hidden_state")
    images = images_for(before)
    expected = before.encoder.post_layernorm(before.encode_features(images))
    torch.testing.assert_close(behind.encode_features(images), expected)
    assert not torch.allclose(before.encode_features(images), expected)


@pytest.mark.parametrize("encoder", ["siglip", "internvit"])
def test_own_normalisation_equals_the_image_processors(
    encoder: str, make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    imagenet = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
    model = make_tokenizer(encoder, **(imagenet if encoder == "internvit" else {}))
    model.save_pretrained(tmp_path)
    image = tensor_to_image(images_for(model)[0])
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")[
        "pixel_values"
    ][0]
    torch.testing.assert_close(
        model.normalize(image_to_tensor(image)), pixel_values, atol=1e-6, rtol=0
    )


def test_image_processor_crops_as_the_package_does(
    make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    model = make_tokenizer()
    model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    noise = tensor_to_image(torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)))
    for size in ((120, 80), (65, 190), (40, 50), (64, 64)):
        image = noise.resize(size)
        found = processor(image, return_tensors="pt")["pixel_values"][0]
        expected = model.normalize(image_to_tensor(resize_and_crop(image, 64)))
        assert (
            found - expected
        ).abs().mean() < 0.05  # where sides do not divide, half a pixel of shift


@torch.no_grad()
@pytest.mark.parametrize("name", ["uint8", "0 to 255", "-1 to 1", "NaN"])
def test_images_outside_of_their_range_are_refused(name: str, tokenizer: VQRAEModel) -> None:
    images = images_for(tokenizer)
    wrong = {
        "uint8": (images * 255).byte(),
        "0 to 255": images * 255,
        "-1 to 1": images * 2 - 1,
        "NaN": images * float("nan"),
    }[name]
    for call in (tokenizer.encode, tokenizer.encode_features, tokenizer):
        with pytest.raises(
            ValueError, match=r"expected (floats in )?\[0, 1\]: divide 8-bit values by 255"
        ):
            call(wrong)
    assert tokenizer.encode(images_for(tokenizer).round()).shape[0] == len(
        images
    )  # 0 and 1 belong to it


@torch.no_grad()
def test_a_half_precision_model_keeps_its_codes(tokenizer: VQRAEModel, tmp_path: Path) -> None:
    initialize_codebook(tokenizer, images_for(tokenizer, 8))
    tokenizer.save_pretrained(tmp_path)
    attention = tokenizer.config._attn_implementation
    half = VQRAEModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=attention
    ).eval()
    images = images_for(tokenizer)
    assert half.encode_features(images).dtype == torch.bfloat16
    assert torch.equal(half.encode(images.bfloat16().float()), half.encode(images.bfloat16()))
    assert (half.encode(images) == tokenizer.encode(images)).float().mean() > 0.8
    assert torch.equal(half.decode(half.encode(images)), half(images).reconstruction)
    with pytest.raises(
        ValueError, match=r"torch\.bfloat16, expected torch\.float32.* from_pretrained\(dtype="
    ):
        tokenizer.bfloat16().encode(images)


@pytest.mark.parametrize("wrong", ["lacks", "has weights unknown", "not finite"])
def test_a_folder_with_wrong_weights_is_refused(
    wrong: str, tokenizer: VQRAEModel, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if wrong == "lacks":
        del weights["decoder.head.weight"], weights["out_proj.bias"]
    elif wrong == "has weights unknown":
        weights["decoder.neck.weight"] = torch.zeros(3)
    else:
        weights["in_proj.bias"][1] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{wrong}"):
        VQRAEModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{wrong}"):
        AutoModel.from_pretrained(tmp_path)


def test_output_patch_size_sets_the_resolution(make_tokenizer: Callable[..., VQRAEModel]) -> None:
    model = make_tokenizer("internvit", output_patch_size=16)
    assert model(images_for(model)).reconstruction.shape[-1] == 4 * 16


def test_wrong_inputs_are_named(tokenizer: VQRAEModel) -> None:
    size = tokenizer.config.image_size
    with pytest.raises(ValueError, match=rf"expected \(B, 3, {size}, {size}\)"):
        tokenizer.encode(torch.rand(1, 3, size, size + 1))
    with pytest.raises(ValueError, match="expected 0 to 63"):
        tokenizer.decode(torch.full((1, tokenizer.config.grid_size**2), 64))
    with pytest.raises(ValueError, match="got codes of shape"):
        tokenizer.decode(torch.zeros(1, 3, dtype=torch.long))
    tokenizer.config.codebook_size = 1024
    needed = -(-1024 // tokenizer.config.grid_size**2)
    with pytest.raises(
        ValueError,
        match=rf"at least {needed} images.*model\.codebook_size.*model\.codebook_init=random",
    ):
        initialize_codebook(tokenizer, images_for(tokenizer))


def test_gradient_reaches_an_unfrozen_encoder_and_stops_at_a_frozen_one(
    tokenizer: VQRAEModel,
) -> None:
    tokenizer.train()
    images = images_for(tokenizer)
    weight = next(
        p
        for name, p in tokenizer.encoder.named_parameters()
        if "projection" in name or "patch_embedding" in name
    )
    tokenizer(images).reconstruction.square().mean().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    tokenizer.zero_grad()
    tokenizer.encoder.requires_grad_(False)
    tokenizer(images).reconstruction.square().mean().backward()
    assert weight.grad is None
    assert tokenizer.in_proj.weight.grad.abs().sum() > 0


def test_cosine_basis_is_invertible_and_keeps_the_contract(
    make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    basis = DCTBasis(8)
    torch.testing.assert_close(basis.basis @ basis.basis.T, torch.eye(8), atol=1e-6, rtol=0)
    flat = torch.zeros(1, 3, 8, 8)
    flat[..., 0, 0] = 1
    assert basis(flat).std() < 1e-6  # the first coefficient is the mean of the patch
    model = make_tokenizer(output_basis="dct")
    model.save_pretrained(tmp_path)
    images = images_for(model)
    with torch.no_grad():
        expected = model(images).reconstruction
        assert torch.equal(model.decode(model.encode(images)), expected)
        loaded = VQRAEModel.from_pretrained(
            tmp_path, attn_implementation=model.config._attn_implementation
        ).eval()
        assert torch.equal(
            loaded(images).reconstruction, expected
        )  # the basis is no weight, and not lost on loading


def test_bypass_decodes_the_features_themselves(make_tokenizer: Callable[..., VQRAEModel]) -> None:
    model = make_tokenizer()
    images = images_for(model)
    with torch.no_grad():
        hidden = model.out_proj(model.project(model.encode_features(images)))
        expected = (model.decoder(hidden) * model.image_std + model.image_mean).clamp(0, 1)
        bypassed = model(images, bypass=True)
    torch.testing.assert_close(bypassed.reconstruction, expected)
    assert torch.equal(bypassed.codes, model.encode(images))


@torch.no_grad()
def test_bypass_gives_the_decoder_what_lies_where_codes_lie(
    make_tokenizer: Callable[..., VQRAEModel],
) -> None:
    model = make_tokenizer(quantizer="l2_vq")
    images = images_for(model)
    hidden = model.out_proj(
        nn.functional.normalize(model.project(model.encode_features(images)), dim=-1)
    )
    expected = (model.decoder(hidden) * model.image_std + model.image_mean).clamp(0, 1)
    torch.testing.assert_close(model(images, bypass=True).reconstruction, expected)


def test_code_space_measured_in_pixels(tokenizer: VQRAEModel) -> None:
    """The autoencoder stays the same function, and distances of features become, to first order, those of images."""
    images = images_for(tokenizer, 8)
    with torch.no_grad():  # half of the dimensions count ten times what they are worth
        half = tokenizer.config.codebook_dim // 2
        tokenizer.in_proj.weight[:half] *= 10
        tokenizer.out_proj.weight[:, :half] /= 10
        before = tokenizer(images, bypass=True).reconstruction
        spread = tokenizer.project(tokenizer.encode_features(images)).var((0, 1)).sum()
    measure_in_pixels(tokenizer, images, num_probes=64)
    with torch.no_grad():
        features = tokenizer.project(tokenizer.encode_features(images))
        torch.testing.assert_close(
            tokenizer(images, bypass=True).reconstruction, before, atol=1e-5, rtol=0
        )
    torch.testing.assert_close(features.var((0, 1)).sum(), spread, rtol=1e-3, atol=0)

    def moved(direction: torch.Tensor) -> float:
        """How far images move with one feature, per distance that the feature moves."""
        shifted = features.clone()
        shifted[:, 0] += 1e-2 * features.std() * direction
        with torch.no_grad():
            first, second = (
                tokenizer.decode_pixels(tokenizer.out_proj(part)) for part in (features, shifted)
            )
        return float((first - second).norm())

    directions = nn.functional.normalize(
        torch.randn(16, features.shape[-1], generator=torch.Generator().manual_seed(0)), dim=-1
    )
    lengths = torch.tensor([moved(direction) for direction in directions])
    assert lengths.std() < 0.3 * lengths.mean()
