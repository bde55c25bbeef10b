"""UniTok's tokenizer against UniTok's own code (golden/unitok.py), timm and open_clip's layout."""

import json
import math
import re
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from tokenizer_trainings import read
from torch import Tensor
from transformers import AutoTokenizer

from vqrae.data.word_tokenizer import END, fit_word_tokenizer
from vqrae.tokenizer import open_clip
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import ModelConfig
from vqrae.tokenizer.configuration import ViTaminConfig
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.projections import AttentionProjection
from vqrae.tokenizer.unitok_checkpoint import (
    ZEROS,
    import_unitok,
    load_published,
    published_config,
    read_checkpoint,
)
from vqrae.tokenizer.vitamin import ViTaminModel

GOLDEN = Path(__file__).parent / "golden"
# Arguments of the published checkpoint.
PUBLISHED = {
    "model": "vitamin_large", "img_size": 256, "drop_path": 0.1, "quant_proj": "attn",
    "vocab_size": 32768, "vocab_width": 64, "num_codebooks": 8, "embed_dim": 768, "text_width": 768,
    "text_heads": 12, "text_layers": 12, "text_vocab_size": 49408, "text_context_length": 77,
}  # fmt: skip
# Parameters by part of the model (the facts' table, without what is not a parameter).
SIZES = {
    "encoder": 332_330_912, "in_proj": 3_246_784, "quantizer": 262_144, "out_proj": 7_615_744,
    "decoder": 352_402_531, "text_model": 123_060_480, "text_projection": 589_824,
    "fc_norm": 2_048, "image_projection": 787_200, "logit_scale": 1,
}  # fmt: skip
Golden = dict[str, Any]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return json.loads((GOLDEN / "unitok.json").read_text())


@pytest.fixture(scope="module")
def script() -> Any:
    """The script that made the golden numbers."""
    return SimpleNamespace(**runpy.run_path(str(GOLDEN / "unitok.py")))


def empty_state(names: dict[str, tuple[int, list[int]]], device: str) -> dict[str, Tensor]:
    """A published state dict without values; what must be 0 is."""
    state = {}
    for name, (count, shape) in names.items():
        for number in range(count):
            key = name.replace("#", str(number))
            state[key] = torch.empty(shape, device=device)
            if ZEROS.fullmatch(key):
                state[key] = torch.zeros(shape)
    return state


@pytest.fixture(scope="module")
def imported(golden: Golden, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was imported from a checkpoint of UniTok at a small size."""
    folder = tmp_path_factory.mktemp("imported")
    state = script.fill(empty_state(golden["small_names"], "cpu"))
    args = PUBLISHED | script.ARGUMENTS
    torch.save({"args": args, "trainer": {"unitok": state}}, folder / "unitok_tokenizer.pth")
    small = {"base": (32, 3, 2, (16, 24))}
    with mock.patch.dict(open_clip.VITAMIN_SIZES, small):
        words = fit_word_tokenizer([], ["a red circle"], size=9, end_with=END)
        words.save_pretrained(folder / "words")
        checkpoint, text_tokenizer = folder / "unitok_tokenizer.pth", str(folder / "words")
        import_unitok(checkpoint, folder / "model", text_tokenizer)
    assert AutoTokenizer.from_pretrained(folder / "model").model_max_length == 9
    return folder


@torch.no_grad()
def test_an_imported_checkpoint_computes_what_unitok_does(
    imported: Path, golden: Golden, script: Any
) -> None:
    model = VQRAEModel.from_pretrained(imported / "model", attn_implementation="sdpa").eval()
    images, tokens = script.images(), torch.tensor(script.TOKENS)
    codes = model.encode(images)
    assert codes.shape == (2, 16, 4)
    assert codes.transpose(1, 2).tolist() == golden["codes"]
    output = model(images)
    assert torch.equal(output.reconstruction, model.decode(codes))
    assert torch.equal(output.quantized_features, model.quantized_features(images))
    found = {
        "features": output.features,
        "quantized_features": output.quantized_features,
        "reconstruction": output.reconstruction,
        "image_embeddings": model.image_embeddings(output.quantized_features),
        "text_embeddings": model.text_embeddings(tokens),
    }
    for name, tensor in found.items():
        assert script.summary(tensor) == pytest.approx(golden[name], abs=2e-5), name
    mask = tokens.cumsum(1) < tokens.sum(1, keepdim=True)  # up to the end token, without it ...
    mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), mask[:, :-1]], dim=1)  # ... and with it
    torch.testing.assert_close(model.text_embeddings(tokens, mask), found["text_embeddings"])
    # Projections and quantizer ignore autocast, so equal features get equal codes.
    with torch.autocast("cpu", torch.bfloat16):
        features_BND, codes = model.encode_features(images), model.encode(images)
        assert features_BND.dtype == torch.bfloat16
    assert torch.equal(codes, model.quantizer(model.project(features_BND)).codes)
    half = VQRAEModel.from_pretrained(imported / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.in_proj.parameters()} == {torch.float32}
    assert half.image_embeddings(half.quantized_features(images)).shape == (2, 24)


def test_a_checkpoint_that_is_not_unitoks_is_refused(imported: Path, tmp_path: Path) -> None:
    file = imported / "unitok_tokenizer.pth"
    _, state = read_checkpoint(file)
    model = VQRAEModel.from_pretrained(imported / "model")
    odd = "post_quant_proj.attn.zero_k_bias"
    for message, wrong in (
        (r"u\.pth: 1 tensors are unknown, such as encoder\.extra", {"encoder.extra": state[odd]}),
        (r"1 tensors are missing, such as decoder\.norm\.weight", {"decoder.norm.weight": None}),
        (
            r"1 tensors are of another shape, such as quant",
            {"quantizer.codebooks.3.codebook.weight": None},
        ),
        (f"{odd}: got values that are not 0", {odd: torch.ones(32)}),
        (
            r"u\.pth: logit_scale holds values that are not finite",
            {"logit_scale": torch.tensor(torch.nan)},
        ),
    ):
        changed = {key: value for key, value in (state | wrong).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            load_published(model, changed, "u.pth")
    with pytest.raises(FileExistsError, match=r"model exists: give another folder"):
        import_unitok(file, imported / "model")
    with pytest.raises(FileNotFoundError, match=r"text_tokenizer nowhere: .* Give a folder, or"):
        import_unitok(file, tmp_path / "model", "nowhere")
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: got no 'args', expected unitok_tokenizer"):
        import_unitok(tmp_path / "other.pth", tmp_path / "model")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"text\.pth: .*Expected unitok_tokenizer\.pth"):
        import_unitok(tmp_path / "text.pth", tmp_path / "model")


def test_the_published_size(golden: Golden) -> None:
    state = empty_state(golden["names"], "meta")
    assert len(state) == 1335
    assert sum(math.prod(tensor.shape) for tensor in state.values()) == 820_333_508
    with torch.device("meta"):
        model = build_tokenizer(read("unitok").model, "sdpa")
        assert published_config(PUBLISHED).to_dict() == model.config.to_dict()
    load_published(model, state, "unitok_tokenizer.pth")
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        sizes[name.partition(".")[0]] += parameter.numel()
    assert sizes == SIZES


@torch.no_grad()
def test_the_number_of_heads_is_not_in_the_weights() -> None:
    eight, sixteen = (AttentionProjection(64, 32, heads) for heads in (2, 4))
    eight.load_state_dict(sixteen.state_dict())
    features = torch.randn(1, 9, 64)
    assert (eight(features) - sixteen(features)).abs().max() > 1e-2


def test_a_tokenizer_starts_from_vitamin_clip(imported: Path, tmp_path: Path) -> None:
    _, state = read_checkpoint(imported / "unitok_tokenizer.pth")
    clip = {"visual.trunk.fc_norm.weight": torch.ones(32), "logit_scale": torch.ones(())}
    clip["visual.head.proj.weight"] = torch.ones(24, 32)
    for key, tensor in state.items():
        if key.startswith("encoder.") and not key.startswith("encoder.norm."):
            clip[key.replace("encoder.", "visual.trunk.", 1)] = tensor
        elif key.startswith("text_encoder."):
            clip[key.replace("text_encoder.", "text.", 1)] = tensor
    torch.save(clip, tmp_path / "pytorch_model.bin")
    values = {"architectures": ["ViTaminCLIP"]}
    values["vision_cfg"] = {"timm_model_name": "vitamin_base_256", "image_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(values))
    expected = VQRAEModel.from_pretrained(imported / "model")
    config = {key: getattr(expected.config, key) for key in ("text_config", "num_codebooks")}
    options = {"encoder": str(tmp_path), "quantizer": "mcq", "codebook_size": 8, "codebook_dim": 8}
    with mock.patch.dict(open_clip.VITAMIN_SIZES, {"base": (32, 3, 2, (16, 24))}):
        given = {"num_hidden_layers": 3, "drop_path": 0.2}
        start = ModelConfig(**options, **config, encoder_config=given)
        model = build_tokenizer(start, "eager")
        text = config["text_config"] | {"num_hidden_layers": 1}
        other = ModelConfig(**options, encoder_config=given, text_config=text, num_codebooks=4)
        with pytest.raises(ValueError, match=r"text_config: got .* expected the text tower that"):
            build_tokenizer(other, "eager")
    assert model.encoder.config.drop_path == 0.2
    weights = expected.state_dict()
    for key, tensor in model.state_dict().items():
        if re.match(r"encoder\.(?!layernorm)|text_", key):
            assert torch.equal(tensor, weights[key]), key
    assert torch.equal(model.encoder.layernorm.weight, torch.ones(32))


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
