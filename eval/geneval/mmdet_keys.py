"""Weights of mmdetection's Mask2Former with a Swin backbone, renamed for transformers' `Mask2FormerForUniversalSegmentation`.

One table says where every key goes; a key without a rule, a missing one and a wrong shape are errors. Besides names, two
things differ. mmdetection keeps query, key and value of an attention in one matrix where transformers has three. And its
patch merging unfolds 2 x 2 neighbours channel by channel, (top left, top right, bottom left, bottom right) of each, where
Swin has the channels of one neighbour after the other, (top left, bottom left, top right, bottom right): loaded under the
right names but in that order, a detector is nearly blind.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

_SWIN = "model.pixel_level_module.encoder.swin."
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_HEAD = r"panoptic_head\."
_DECODER = _HEAD + r"transformer_decoder\."
_ENCODER_LAYER = _HEAD + r"pixel_decoder\.encoder\.layers\.(\d+)\."
_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\."
_ENDS = "(weight|bias)"

# What transformers has beyond mmdetection's keys: a norm that segmentation never reads, and the weights of a loss.
NOT_IN_MMDET = frozenset(
    {_SWIN + "layernorm.weight", _SWIN + "layernorm.bias", "criterion.empty_weight"}
)


def _thirds(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.chunk(3)


def _merging_order(weight: Tensor) -> tuple[Tensor, ...]:
    """(…, C x 4 neighbours) of `nn.Unfold` -> (…, 4 neighbours x C) of Swin."""
    neighbours = weight.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return (neighbours[..., [0, 2, 1, 3], :].flatten(-2),)


@dataclass(frozen=True)
class Rule:
    """Keys that match `pattern` go to `targets` (none: dropped on purpose), one for each part that `convert` gives."""

    pattern: str
    targets: tuple[str, ...]
    convert: Callable[[Tensor], tuple[Tensor, ...]] = lambda weight: (weight,)


def _qkv(prefix: str, end: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{part}_proj.{end}" for part in "qkv")


_SWIN_BLOCK = _SWIN + r"encoder.layers.\1.blocks.\2."
_PIXEL_LAYER = _PIXELS + r"encoder.layers.\1."
_QUERY_LAYER = _QUERIES + r"decoder.layers.\1."
_LAYER = _DECODER + r"layers\.(\d+)\."

RULES = (
    # backbone
    Rule(
        rf"backbone\.patch_embed\.projection\.{_ENDS}",
        (_SWIN + r"embeddings.patch_embeddings.projection.\1",),
    ),
    Rule(rf"backbone\.patch_embed\.norm\.{_ENDS}", (_SWIN + r"embeddings.norm.\1",)),
    Rule(rf"{_BLOCK}norm1\.{_ENDS}", (_SWIN_BLOCK + r"layernorm_before.\3",)),
    Rule(rf"{_BLOCK}norm2\.{_ENDS}", (_SWIN_BLOCK + r"layernorm_after.\3",)),
    Rule(
        rf"{_BLOCK}attn\.w_msa\.relative_position_bias_table",
        (_SWIN_BLOCK + "attention.relative_position_bias.relative_position_bias_table",),
    ),
    Rule(
        rf"{_BLOCK}attn\.w_msa\.relative_position_index", ()
    ),  # follows from the window size, and is the same
    Rule(rf"{_BLOCK}attn\.w_msa\.qkv\.{_ENDS}", _qkv(_SWIN_BLOCK + "attention.", r"\3"), _thirds),
    Rule(rf"{_BLOCK}attn\.w_msa\.proj\.{_ENDS}", (_SWIN_BLOCK + r"attention.o_proj.\3",)),
    Rule(rf"{_BLOCK}ffn\.layers\.0\.0\.{_ENDS}", (_SWIN_BLOCK + r"mlp.fc1.\3",)),
    Rule(rf"{_BLOCK}ffn\.layers\.1\.{_ENDS}", (_SWIN_BLOCK + r"mlp.fc2.\3",)),
    Rule(
        rf"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)\.{_ENDS}",
        (_SWIN + r"encoder.layers.\1.downsample.\2.\3",),
        _merging_order,
    ),
    *(
        Rule(
            rf"backbone\.norm{i}\.{_ENDS}",
            (rf"model.pixel_level_module.encoder.hidden_states_norms.stage{i + 1}.\1",),
        )
        for i in range(4)
    ),
    # pixel decoder; both sides count levels from the coarsest
    Rule(
        rf"{_HEAD}pixel_decoder\.input_convs\.(\d)\.conv\.{_ENDS}",
        (_PIXELS + r"input_projections.\1.0.\2",),
    ),
    Rule(
        rf"{_HEAD}pixel_decoder\.input_convs\.(\d)\.gn\.{_ENDS}",
        (_PIXELS + r"input_projections.\1.1.\2",),
    ),
    Rule(
        rf"{_ENCODER_LAYER}attentions\.0\.(sampling_offsets|attention_weights|value_proj|output_proj)\.{_ENDS}",
        (_PIXEL_LAYER + r"self_attn.\2.\3",),
    ),
    Rule(rf"{_ENCODER_LAYER}norms\.0\.{_ENDS}", (_PIXEL_LAYER + r"self_attn_layer_norm.\2",)),
    Rule(rf"{_ENCODER_LAYER}ffns\.0\.layers\.0\.0\.{_ENDS}", (_PIXEL_LAYER + r"fc1.\2",)),
    Rule(rf"{_ENCODER_LAYER}ffns\.0\.layers\.1\.{_ENDS}", (_PIXEL_LAYER + r"fc2.\2",)),
    Rule(rf"{_ENCODER_LAYER}norms\.1\.{_ENDS}", (_PIXEL_LAYER + r"final_layer_norm.\2",)),
    Rule(rf"{_HEAD}pixel_decoder\.level_encoding\.weight", (_PIXELS + "level_embed",)),
    Rule(
        rf"{_HEAD}pixel_decoder\.lateral_convs\.0\.conv\.weight", (_PIXELS + "adapter_1.0.weight",)
    ),
    Rule(rf"{_HEAD}pixel_decoder\.lateral_convs\.0\.gn\.{_ENDS}", (_PIXELS + r"adapter_1.1.\1",)),
    Rule(rf"{_HEAD}pixel_decoder\.output_convs\.0\.conv\.weight", (_PIXELS + "layer_1.0.weight",)),
    Rule(rf"{_HEAD}pixel_decoder\.output_convs\.0\.gn\.{_ENDS}", (_PIXELS + r"layer_1.1.\1",)),
    Rule(rf"{_HEAD}pixel_decoder\.mask_feature\.{_ENDS}", (_PIXELS + r"mask_projection.\1",)),
    # queries; a layer attends to the image first (attentions.0), then to the other queries (attentions.1)
    Rule(
        rf"{_LAYER}attentions\.0\.attn\.in_proj_{_ENDS}", (_QUERY_LAYER + r"cross_attn.in_proj_\2",)
    ),
    Rule(
        rf"{_LAYER}attentions\.0\.attn\.out_proj\.{_ENDS}",
        (_QUERY_LAYER + r"cross_attn.out_proj.\2",),
    ),
    Rule(rf"{_LAYER}norms\.0\.{_ENDS}", (_QUERY_LAYER + r"cross_attn_layer_norm.\2",)),
    Rule(
        rf"{_LAYER}attentions\.1\.attn\.in_proj_{_ENDS}",
        _qkv(_QUERY_LAYER + "self_attn.", r"\2"),
        _thirds,
    ),
    Rule(
        rf"{_LAYER}attentions\.1\.attn\.out_proj\.{_ENDS}",
        (_QUERY_LAYER + r"self_attn.out_proj.\2",),
    ),
    Rule(rf"{_LAYER}norms\.1\.{_ENDS}", (_QUERY_LAYER + r"self_attn_layer_norm.\2",)),
    Rule(rf"{_LAYER}ffns\.0\.layers\.0\.0\.{_ENDS}", (_QUERY_LAYER + r"fc1.\2",)),
    Rule(rf"{_LAYER}ffns\.0\.layers\.1\.{_ENDS}", (_QUERY_LAYER + r"fc2.\2",)),
    Rule(rf"{_LAYER}norms\.2\.{_ENDS}", (_QUERY_LAYER + r"final_layer_norm.\2",)),
    Rule(rf"{_DECODER}post_norm\.{_ENDS}", (_QUERIES + r"decoder.layernorm.\1",)),
    *(
        Rule(
            rf"{_HEAD}mask_embed\.{2 * i}\.{_ENDS}",
            (rf"{_QUERIES}decoder.mask_predictor.mask_embedder.{i}.0.\1",),
        )
        for i in range(3)
    ),
    Rule(rf"{_HEAD}query_embed\.weight", (_QUERIES + "queries_embedder.weight",)),
    Rule(rf"{_HEAD}query_feat\.weight", (_QUERIES + "queries_features.weight",)),
    Rule(rf"{_HEAD}level_embed\.weight", (_QUERIES + "level_embed.weight",)),
    Rule(rf"{_HEAD}cls_embed\.{_ENDS}", (r"class_predictor.\1",)),
)


def from_mmdet(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder an mmdetection checkpoint.

    Args:
        weights: the checkpoint's `state_dict`.
        expected: the state of the transformers model that it is for, whose names and shapes must come out.

    Raises:
        ValueError: listing keys without a rule, keys that two sources claim, missing keys and wrong shapes.
    """
    converted: dict[str, Tensor] = {}
    problems = []
    for key, weight in weights.items():
        matches = [(rule, match) for rule in RULES if (match := re.fullmatch(rule.pattern, key))]
        if len(matches) != 1:
            problems.append(f"{key}: {len(matches)} rules")
            continue
        [(rule, match)] = matches
        for target, part in zip(
            rule.targets, rule.convert(weight) if rule.targets else (), strict=True
        ):
            name = match.expand(target)
            if name in converted:
                problems.append(f"{name}: given twice")
            converted[name] = part
    problems += [f"{name}: unknown to transformers" for name in converted.keys() - expected.keys()]
    problems += [f"{name}: missing" for name in expected.keys() - converted.keys() - NOT_IN_MMDET]
    problems += _wrong_shapes(converted, expected)
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise ValueError(
            f"the checkpoint is not mmdetection's Mask2Former Swin-S for 80 classes: {len(problems)} problems\n  {shown}"
        )
    return converted


def _wrong_shapes(converted: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterable[str]:
    for name in converted.keys() & expected.keys():
        found, wanted = tuple(converted[name].shape), tuple(expected[name].shape)
        if found != wanted:
            yield f"{name}: shape {found}, expected {wanted}"
