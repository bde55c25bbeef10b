"""UniTok's networks against the reference code, timm and open_clip's layout."""

import re

import pytest
import timm
import torch
from torch import Tensor

from vqrae.tokenizer.configuration import ViTaminConfig
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.projections import AttentionProjection
from vqrae.tokenizer.vitamin import ViTaminModel


@torch.no_grad()
@pytest.mark.parametrize("widths", [(32, 8), (8, 32)])
def test_a_causal_projection_continues_from_its_cache(widths: tuple[int, int]) -> None:
    projection = AttentionProjection(*widths, num_heads=4, causal=True)
    features = torch.randn(2, 7, widths[0])
    expected = projection(features)
    later = features.clone()
    later[:, 4:] = 0
    torch.testing.assert_close(projection(later)[:, :4], expected[:, :4])
    seen: list[tuple[Tensor, ...]] = []

    def cache(*keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(keys_and_values)
        keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*seen, strict=True))
        return keys, values

    parts = [projection(part, cache=cache) for part in features.split([3, 1, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"projection_heads: got 3, expected a divisor .* 32"):
        AttentionProjection(32, 8, num_heads=3)


SMALL = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6}
SMALL |= {"stem_widths": (64, 128), "image_size": 64}
TIMM_KEYS = {"patch_embed.backbone.": "embeddings.", "blocks.": "encoder.layers."}
TIMM_KEYS |= {"norm.": "layernorm."}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_vitamin_equals_timm(attention: str) -> None:
    options = {"patch_size": 1, "fc_norm": False, "num_classes": 0, "global_pool": ""}
    options |= {"pos_embed": "none", "class_token": False, "img_size": 64, "depth": 3}
    timm_model = timm.create_model("vitamin_small_224", act_layer="gelu_tanh", **options).eval()
    other = timm.create_model("vitamin_small_224", **options).eval()
    for name, parameter in timm_model.named_parameters():
        if name.startswith("blocks") and parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    other.load_state_dict(timm_model.state_dict())
    config = ViTaminConfig(**SMALL)
    model = ViTaminModel._from_config(config, attn_implementation=attention).eval()
    state = {}
    for key, tensor in timm_model.state_dict().items():
        for old, new in TIMM_KEYS.items():
            key = re.sub(f"^{re.escape(old)}", new, key)
        state[key] = tensor
    model.load_state_dict(state)
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = timm_model.forward_features(pixel_values)
    output = model(pixel_values, output_hidden_states=True)
    tolerance = 0.0 if attention == "sdpa" else 1e-5  # timm takes the fused kernel
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=tolerance)
    assert (other.forward_features(pixel_values) - expected).abs().max() > 1e-4
    assert len(output.hidden_states) == 4
    for tap, state_BND in (
        ("hidden_states[-1]", output.hidden_states[-1]),
        ("last_hidden_state", output.last_hidden_state),
    ):
        assert torch.equal(encoder_features(model, pixel_values, tap), state_BND)
    assert model(torch.randn(1, 3, 32, 96)).last_hidden_state.shape == (1, 2 * 6, 384)


def test_vitamin_starts_as_in_timm() -> None:
    torch.manual_seed(0)
    timm_model = timm.create_model("vitamin_small_224", pos_embed="none", num_classes=0, depth=3)
    model = ViTaminModel(ViTaminConfig(**SMALL))
    weights = model.state_dict()
    for key, expected in timm_model.state_dict().items():
        for old, new in TIMM_KEYS.items():
            key = re.sub(f"^{re.escape(old)}", new, key)
        if expected.ndim > 1:
            torch.testing.assert_close(weights[key].std(), expected.std(), rtol=0.1, atol=0)
