"""GenEval's detector and colour test in transformers, compared with mmdetection's own numbers.

golden/mask2former.json was made by the script of its name, in an environment with mmdetection.
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Mask2FormerForUniversalSegmentation

from vqrae.eval.geneval.clip_colors import TEMPLATES, ClipColorClassifier, crop_object
from vqrae.eval.geneval.mask2former import (
    MEAN,
    MMDET_PADDING,
    MMDET_URL,
    STD,
    Mask2FormerDetector,
    instances,
    prepare,
    swin_small_config,
)
from vqrae.eval.geneval.mmdet_keys import NOT_IN_MMDET, from_mmdet
from vqrae.eval.geneval.prompts import OBJECT_NAMES
from vqrae.eval.geneval.rules import COLORS, Detection
from vqrae.eval.reconstruction.networks import NotMeasured

GOLDEN = Path(__file__).parent / "golden" / "mask2former.json"
EXPECTED = json.loads(GOLDEN.read_text())
SCRIPT = runpy.run_path(str(GOLDEN.with_suffix(".py")))


# ---- the detector


def test_every_key_goes_to_one_place_of_the_real_model() -> None:
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(swin_small_config())
        checkpoint = {name: torch.empty(shape) for name, shape in EXPECTED["shapes"].items()}
    assert sum(p.numel() for p in model.parameters()) == 68_741_083
    converted = from_mmdet(checkpoint, model.state_dict())
    assert converted.keys() == model.state_dict().keys() - NOT_IN_MMDET
    kept = [t.numel() for name, t in checkpoint.items() if "relative_position_index" not in name]
    assert sum(t.numel() for t in converted.values()) == sum(kept)
    checkpoint["panoptic_head.extra"] = checkpoint.pop("panoptic_head.level_embed.weight")
    checkpoint["panoptic_head.cls_embed.bias"] = torch.empty(134, device="meta")  # the panoptic one
    with pytest.raises(ValueError, match="3 problems") as error:
        from_mmdet(checkpoint, model.state_dict())
    assert "class_predictor.bias: shape (134,), expected (81,)" in str(error.value)
    assert "level_embed.weight: missing" in str(error.value)
    assert "panoptic_head.extra: 0 rules" in str(error.value)


def test_preparation() -> None:
    """OpenCV's resize rounds in fixed point: one grey level at most."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    for size, case in zip(SCRIPT["SIZES"], EXPECTED["prepared"], strict=True):
        pixels, covered = prepare(SCRIPT["image"](size), MMDET_PADDING)
        assert (list(covered), list(pixels.shape[2:])) == (case["covered"], case["padded"])
        if list(covered) != case["padded"]:
            assert pixels[0, :, -1, -1].tolist() == pytest.approx(case["margin"], abs=1e-5)
        levels = pixels[0, :, : covered[0], : covered[1]].permute(1, 2, 0) * std + mean
        found = levels.round().flatten()[:: SCRIPT["STRIDE"]]
        difference = (found - torch.tensor(case["levels"])).abs()
        assert difference.max() <= 1
        assert difference.mean() < 0.2
    pixels, covered = prepare(Image.new("RGB", (200, 100)))  # Hugging Face's weights: zeros
    assert pixels[..., covered[0] :, :].abs().max() == 0


def test_network_with_converted_weights() -> None:
    model = Mask2FormerForUniversalSegmentation(swin_small_config()).eval()
    weights = SCRIPT["weights"](EXPECTED["shapes"])
    model.load_state_dict(from_mmdet(weights, model.state_dict()), strict=False)
    with torch.inference_mode():
        output = model(pixel_values=SCRIPT["pixels"]())
    found = SCRIPT["sample"](output.class_queries_logits[0], output.masks_queries_logits[0])
    for name, values in EXPECTED["network"].items():
        difference = (torch.tensor(found[name]) - torch.tensor(values)).abs()
        # Attention is masked where a logit is below zero: rounding may turn a few around.
        assert difference.quantile(0.95) < 1e-3
        assert torch.tensor(values).std() > 0.3
    detector = Mask2FormerDetector(model, "d", "1")
    seen = detector.detect(Image.new("RGB", (9, 6)))
    assert (len(seen), {d.mask.shape for d in seen if d.mask is not None}) == (100, {(6, 9)})


@pytest.mark.parametrize("number", [0, 1])
def test_instances(number: int) -> None:
    found = instances(*SCRIPT["logits"](number))
    rows = SCRIPT["rows"]([(OBJECT_NAMES.index(d.name), d.score, d.box) for d in found])
    expected = EXPECTED["fused"][number]
    assert [(row[0], *row[2:]) for row in rows] == [(row[0], *row[2:]) for row in expected]
    assert [row[1] for row in rows] == pytest.approx([row[1] for row in expected], abs=2e-5)


def test_missing_weights_say_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(NotMeasured, match=MMDET_URL):
        Mask2FormerDetector.from_mmdet()
    (tmp_path / "other.pth").write_bytes(b"another checkpoint")
    with pytest.raises(ValueError, match="SHA-256"):
        Mask2FormerDetector.from_mmdet(str(tmp_path / "other.pth"))


# ---- colours


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipColorClassifier:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = " ".join([*TEMPLATES, *COLORS, "cat"]).replace("{color}-colored", "colored -").split()
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *sorted(set(words))])}
    text_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    text_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("clip")
    fast = PreTrainedTokenizerFast(tokenizer_object=text_tokenizer, pad_token="[PAD]")
    fast.save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {**small, "vocab_size": 64, "eos_token_id": 63}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    return ClipColorClassifier.from_pretrained(str(folder))


def test_the_crop_is_the_object_on_grey() -> None:
    image = Image.new("RGB", (20, 10), "red")
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 4:8] = True
    crop = crop_object(image, Detection("cat", 1, (3.4, 1.6, 8.6, 6.0), mask))
    assert crop.size == (6, 4)  # edges are rounded
    assert [crop.getpixel((x, 0)) for x in (0, 1)] == [(153, 153, 153), (255, 0, 0)]
    whole = crop_object(image, Detection("cat", 1, (0, 0, 20, 10)))
    assert whole.getpixel((0, 0)) == (255, 0, 0)


def test_a_colour_is_the_mean_of_three_templates(clip: ClipColorClassifier) -> None:
    def vector(text: str) -> Tensor:
        inputs = clip.text_tokenizer(text, return_tensors="pt")
        pooled = clip.model.text_model(**inputs).pooler_output
        return nn.functional.normalize(clip.model.text_projection(pooled), dim=-1)

    texts = (
        "a photo of a green cat",
        "a photo of a green-colored cat",
        "a photo of a green object",
    )
    mean = torch.cat([vector(text) for text in texts]).mean(0)
    found = clip._color_vectors("cat")[COLORS.index("green")]
    torch.testing.assert_close(found, nn.functional.normalize(mean, dim=-1), atol=1e-5, rtol=0)


def test_the_most_similar_colour_wins(clip: ClipColorClassifier) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    objects = [Detection("cat", 1, (0, 0, 30, 20)), Detection("cat", 1, (5, 5, 60, 40))]
    pixels = torch.stack([clip._transform(crop_object(image, d)) for d in objects])
    pooled = clip.model.vision_model(pixel_values=pixels).pooler_output
    # The colours of a random text tower nearly coincide: others in their place.
    clip._colors["dog"] = torch.eye(16)[:10]
    similarity = clip.model.visual_projection(pooled)[:, :10]
    assert clip.classify(image, objects, "dog") == [COLORS[i] for i in similarity.argmax(-1)]


def test_another_activation_is_refused(clip: ClipColorClassifier, tmp_path: Path) -> None:
    clip.model.config.vision_config.hidden_act = "gelu"
    clip.model.save_pretrained(tmp_path)
    clip.model.config.vision_config.hidden_act = "quick_gelu"
    with pytest.raises(ValueError, match="expected quick_gelu"):
        ClipColorClassifier.from_pretrained(str(tmp_path))
