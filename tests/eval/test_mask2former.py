"""GenEval's detector in transformers: the key map from mmdetection, its preparation and its instances, CLIP's colours."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, Mask2FormerForUniversalSegmentation
from transformers.models.swin.modeling_swin import SwinPatchMerging, SwinRelativePositionBias

from vqrae.eval.geneval.clip_colors import TEMPLATES, ClipColorClassifier, crop_object
from vqrae.eval.geneval.mask2former import (
    MMDET_URL,
    Mask2FormerDetector,
    instances,
    mask_box,
    prepare,
    swin_small_config,
)
from vqrae.eval.geneval.mmdet_keys import NOT_IN_MMDET, from_mmdet
from vqrae.eval.geneval.prompts import OBJECT_NAMES
from vqrae.eval.geneval.rules import COLORS, Detection
from vqrae.eval.reconstruction.networks import NotMeasured

WIDTHS, DEPTHS, HEADS = (96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)


def mmdet_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of mmdetection 2.x: `SwinTransformer` and `Mask2FormerHead` of its Swin-S configuration."""

    def both(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    yield from both("backbone.patch_embed.projection", 96, 3, 4, 4)
    yield from both("backbone.patch_embed.norm", 96)
    for stage, (width, depth, heads) in enumerate(zip(WIDTHS, DEPTHS, HEADS, strict=True)):
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}"
            yield from both(f"{name}.norm1", width)
            yield f"{name}.attn.w_msa.relative_position_bias_table", (169, heads)
            yield f"{name}.attn.w_msa.relative_position_index", (49, 49)
            yield from both(f"{name}.attn.w_msa.qkv", 3 * width, width)
            yield from both(f"{name}.attn.w_msa.proj", width, width)
            yield from both(f"{name}.norm2", width)
            yield from both(f"{name}.ffn.layers.0.0", 4 * width, width)
            yield from both(f"{name}.ffn.layers.1", width, 4 * width)
        if stage < 3:
            yield from both(f"backbone.stages.{stage}.downsample.norm", 4 * width)
            yield f"backbone.stages.{stage}.downsample.reduction.weight", (2 * width, 4 * width)
        yield from both(f"backbone.norm{stage}", width)
    head = "panoptic_head"
    for i, width in enumerate((768, 384, 192)):
        yield from both(f"{head}.pixel_decoder.input_convs.{i}.conv", 256, width, 1, 1)
        yield from both(f"{head}.pixel_decoder.input_convs.{i}.gn", 256)
    for layer in range(6):
        name = f"{head}.pixel_decoder.encoder.layers.{layer}"
        yield from both(f"{name}.attentions.0.sampling_offsets", 192, 256)
        yield from both(f"{name}.attentions.0.attention_weights", 96, 256)
        yield from both(f"{name}.attentions.0.value_proj", 256, 256)
        yield from both(f"{name}.attentions.0.output_proj", 256, 256)
        yield from both(f"{name}.ffns.0.layers.0.0", 1024, 256)
        yield from both(f"{name}.ffns.0.layers.1", 256, 1024)
        yield from both(f"{name}.norms.0", 256)
        yield from both(f"{name}.norms.1", 256)
    yield f"{head}.pixel_decoder.level_encoding.weight", (3, 256)
    for kind, width, kernel in (("lateral", 96, 1), ("output", 256, 3)):
        yield f"{head}.pixel_decoder.{kind}_convs.0.conv.weight", (256, width, kernel, kernel)
        yield from both(f"{head}.pixel_decoder.{kind}_convs.0.gn", 256)
    yield from both(f"{head}.pixel_decoder.mask_feature", 256, 256, 1, 1)
    for layer in range(9):
        name = f"{head}.transformer_decoder.layers.{layer}"
        for attention in range(2):
            yield f"{name}.attentions.{attention}.attn.in_proj_weight", (768, 256)
            yield f"{name}.attentions.{attention}.attn.in_proj_bias", (768,)
            yield from both(f"{name}.attentions.{attention}.attn.out_proj", 256, 256)
        yield from both(f"{name}.ffns.0.layers.0.0", 2048, 256)
        yield from both(f"{name}.ffns.0.layers.1", 256, 2048)
        for norm in range(3):
            yield from both(f"{name}.norms.{norm}", 256)
    yield from both(f"{head}.transformer_decoder.post_norm", 256)
    for name in ("query_embed", "query_feat"):
        yield f"{head}.{name}.weight", (100, 256)
    yield f"{head}.level_embed.weight", (3, 256)
    yield from both(f"{head}.cls_embed", 81, 256)
    for i in (0, 2, 4):
        yield from both(f"{head}.mask_embed.{i}", 256, 256)


@pytest.fixture(scope="module")
def model() -> Mask2FormerForUniversalSegmentation:
    with torch.device("meta"):
        return Mask2FormerForUniversalSegmentation(swin_small_config())


@pytest.fixture
def checkpoint() -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in mmdet_shapes()}


class TestKeyMap:
    def test_every_key_goes_to_one_place_of_the_real_model(self, model, checkpoint) -> None:
        assert sum(p.numel() for p in model.parameters()) == 68_741_083
        converted = from_mmdet(checkpoint, model.state_dict())
        assert converted.keys() == model.state_dict().keys() - NOT_IN_MMDET
        dropped = sum(
            t.numel() for name, t in checkpoint.items() if name.endswith("relative_position_index")
        )
        assert (
            sum(t.numel() for t in converted.values())
            == sum(t.numel() for t in checkpoint.values()) - dropped
        )

    def test_leftover_missing_and_misshapen_keys_are_refused(self, model, checkpoint) -> None:
        checkpoint["panoptic_head.extra"] = checkpoint.pop("panoptic_head.level_embed.weight")
        checkpoint["panoptic_head.cls_embed.bias"] = torch.empty(
            134, device="meta"
        )  # the panoptic checkpoint
        with pytest.raises(ValueError, match="3 problems") as error:
            from_mmdet(checkpoint, model.state_dict())
        assert "class_predictor.bias: shape (134,), expected (81,)" in str(error.value)
        assert "level_embed.weight: missing" in str(error.value)
        assert "panoptic_head.extra: 0 rules" in str(error.value)

    def test_parts_of_an_attention_go_to_query_key_and_value(self, model, checkpoint) -> None:
        name = "backbone.stages.0.blocks.1.attn.w_msa.qkv.bias"
        checkpoint[name] = torch.arange(288.0)
        converted = from_mmdet(checkpoint, model.state_dict())
        prefix = "model.pixel_level_module.encoder.swin.encoder.layers.0.blocks.1.attention"
        assert [converted[f"{prefix}.{part}_proj.bias"][0].item() for part in "qkv"] == [0, 96, 192]

    def test_patch_merging_computes_the_same(self, model, checkpoint) -> None:
        """mmdetection's `PatchMerging` is `nn.Unfold`, norm, linear; renaming alone would mix up neighbours and channels."""
        norm, reduction = nn.LayerNorm(384), nn.Linear(384, 192, bias=False)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        prefix = "backbone.stages.0.downsample."
        checkpoint |= {f"{prefix}norm.{end}": getattr(norm, end).data for end in ("weight", "bias")}
        checkpoint[prefix + "reduction.weight"] = reduction.weight.data
        converted = from_mmdet(checkpoint, model.state_dict())
        place = "model.pixel_level_module.encoder.swin.encoder.layers.0.downsample."
        merging = SwinPatchMerging(96)
        merging.load_state_dict(
            {key.removeprefix(place): v for key, v in converted.items() if key.startswith(place)}
        )
        images = torch.randn(1, 96, 4, 6)
        expected = reduction(norm(nn.functional.unfold(images, 2, stride=2).transpose(1, 2)))
        torch.testing.assert_close(merging(images.flatten(2).transpose(1, 2), (4, 6)), expected)

    def test_the_dropped_index_is_the_one_that_transformers_computes(self) -> None:
        rows = (torch.arange(0, 13 * 7, 13)[:, None] + torch.arange(7)[None]).reshape(1, -1)
        mmdet = (rows + rows.T).flip(1)
        assert torch.equal(
            SwinRelativePositionBias(3, (7, 7)).relative_position_index.view(49, 49), mmdet
        )


class TestInstances:
    def test_preparation(self) -> None:
        image = Image.new("RGB", (200, 100), (124, 116, 104))
        pixels, covered = prepare(image)
        assert covered == (667, 1333)  # the long side decides
        assert pixels.shape == (1, 3, 672, 1344)
        assert pixels[0, :, 0, 0].tolist() == pytest.approx(
            [(124 - 123.675) / 58.395, (116 - 116.28) / 57.12, (104 - 103.53) / 57.375], abs=1e-5
        )
        assert pixels[..., 667:, :].abs().max() == 0
        grey, _ = prepare(image, 128)  # as mmdetection's configuration pads, before it normalises
        assert grey[0, :, 667:].flatten(1).unique(dim=1).flatten().tolist() == pytest.approx(
            [(128 - 123.675) / 58.395, (128 - 116.28) / 57.12, (128 - 103.53) / 57.375], abs=1e-5
        )
        assert torch.equal(grey[..., :667, :1333], pixels[..., :667, :1333])
        assert prepare(Image.new("RGB", (512, 512)))[0].shape == (1, 3, 800, 800)

    def test_scores_masks_and_boxes(self) -> None:
        """Two queries on a network grid of 4 x 4; the right half of the input is padding."""
        class_logits = torch.full((2, 81), -20.0)
        class_logits[0, 15], class_logits[1, 16], class_logits[1, 80] = (
            20.0,
            0.0,
            0.0,
        )  # cat; dog or nothing
        mask_logits = torch.full((2, 4, 4), -8.0)
        mask_logits[0, :2, :2] = 3.0
        mask_logits[1, :, 2:] = 5.0  # in the padding only
        found = instances(class_logits, mask_logits, padded=(4, 4), resized=(4, 2), size=(8, 4))
        assert len(found) == 100
        cat = found[0]
        inside = torch.nn.functional.interpolate(
            mask_logits[None, :1, :, :2], (8, 4), mode="bilinear"
        )[0, 0]
        certainty = inside[inside > 0].sigmoid().mean().item()
        assert (cat.name, cat.score) == ("cat", pytest.approx(certainty, abs=1e-4))
        assert cat.box == (0, 0, 4, int((inside > 0).sum() / 4))
        assert cat.mask is not None
        assert cat.mask.shape == (8, 4)
        dog = next(d for d in found if d.name == "dog")
        assert (dog.score, dog.box) == (0, (0, 0, 0, 0))  # an empty mask

    def test_far_edges_of_a_box_are_exclusive(self) -> None:
        mask = np.zeros((5, 6), dtype=bool)
        mask[1:3, 2:5] = True
        assert mask_box(mask) == (2, 1, 5, 3)

    def test_a_network_of_random_weights_runs(self) -> None:
        from transformers import Mask2FormerConfig, SwinConfig

        backbone = SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = Mask2FormerConfig(
            backbone_config=backbone, num_labels=80, num_queries=3, hidden_dim=32, feature_size=32, mask_feature_size=32,
            encoder_layers=1, decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=32, dim_feedforward=32,
        )  # fmt: skip
        torch.manual_seed(0)
        detector = Mask2FormerDetector(
            Mask2FormerForUniversalSegmentation(config), "random", "none"
        )
        found = detector.detect(Image.new("RGB", (40, 30)))
        assert len(found) == 100
        assert all(
            d.name in OBJECT_NAMES and 0 <= d.score <= 1 and d.mask is not None for d in found
        )
        assert {d.mask.shape for d in found if d.mask is not None} == {(30, 40)}


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
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("clip")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "eos_token_id": 63},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return ClipColorClassifier.from_pretrained(str(folder))


class TestColors:
    def test_the_crop_is_the_object_on_grey(self) -> None:
        image = Image.new("RGB", (20, 10), "red")
        mask = np.zeros((10, 20), dtype=bool)
        mask[2:5, 4:8] = True
        crop = crop_object(image, Detection("cat", 1, (3.4, 1.6, 8.6, 6.0), mask))
        assert crop.size == (6, 4)  # edges are rounded
        assert crop.getpixel((0, 0)) == (153, 153, 153)
        assert crop.getpixel((1, 0)) == (255, 0, 0)
        assert crop_object(image, Detection("cat", 1, (0, 0, 20, 10))).getpixel((0, 0)) == (
            255,
            0,
            0,
        )
        with pytest.raises(ValueError, match="expected the same size"):
            crop_object(image, Detection("cat", 1, (0, 0, 1, 1), np.zeros((3, 3), dtype=bool)))

    def test_a_colour_is_the_mean_of_three_templates(self, clip: ClipColorClassifier) -> None:
        vectors = clip._color_vectors("cat")
        assert vectors.shape == (10, 16)
        texts = [
            "a photo of a green cat",
            "a photo of a green-colored cat",
            "a photo of a green object",
        ]
        rows = []
        for text in texts:
            pooled = clip.model.text_model(
                **clip.text_tokenizer(text, return_tensors="pt")
            ).pooler_output
            rows.append(nn.functional.normalize(clip.model.text_projection(pooled), dim=-1))
        expected = nn.functional.normalize(torch.cat(rows).mean(0), dim=-1)
        torch.testing.assert_close(vectors[COLORS.index("green")], expected, atol=1e-5, rtol=0)

    def test_the_most_similar_colour_wins(self, clip: ClipColorClassifier) -> None:
        image = Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        )
        objects = [Detection("cat", 1, (0, 0, 30, 20)), Detection("cat", 1, (5, 5, 60, 40))]
        pixels = torch.stack([clip._transform(crop_object(image, d)) for d in objects])
        pooled = clip.model.vision_model(pixel_values=pixels).pooler_output
        clip._colors["dog"] = torch.eye(16)[
            :10
        ]  # the colours of a random text tower nearly coincide
        similarity = clip.model.visual_projection(pooled)[:, :10]
        assert clip.classify(image, objects, "dog") == [COLORS[i] for i in similarity.argmax(-1)]

    def test_another_activation_is_refused(self, clip: ClipColorClassifier, tmp_path: Path) -> None:
        clip.model.config.vision_config.hidden_act = "gelu"
        clip.model.save_pretrained(tmp_path)
        clip.model.config.vision_config.hidden_act = "quick_gelu"
        with pytest.raises(ValueError, match="expected quick_gelu"):
            ClipColorClassifier.from_pretrained(str(tmp_path))
