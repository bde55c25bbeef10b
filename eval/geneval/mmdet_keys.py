"""Weights of mmdetection's Mask2Former with Swin, renamed for `Mask2FormerForUniversalSegmentation`.

A key without a rule, a missing one and a wrong shape are errors. Besides names, two things differ.
mmdetection keeps query, key and value of an attention in one matrix where transformers has three. And
its patch merging unfolds 2 x 2 neighbours channel by channel, (top left, top right, bottom left, bottom
right) of each, where Swin has the channels of one neighbour after the other, (top left, bottom left, top
right, bottom right): loaded in the wrong order, a detector is nearly blind.
"""

import re
from collections.abc import Mapping

from torch import Tensor

SWIN = "model.pixel_level_module.encoder.swin."
PIXELS = "model.pixel_level_module.decoder."
QUERIES = "model.transformer_module."

# Prefixes of mmdetection and transformers -> the rest of the key. # is a number, $ is weight or bias;
# {qkv} splits the tensor in three; None: dropped on purpose.
RULES: dict[tuple[str, str], dict[str, str | None]] = {
    ("backbone.", SWIN): {
        "patch_embed.projection.$": "embeddings.patch_embeddings.projection.$",
        "patch_embed.norm.$": "embeddings.norm.$",
        "stages.#.downsample.norm.$": "encoder.layers.#.downsample.norm.$",
        "stages.#.downsample.reduction.$": "encoder.layers.#.downsample.reduction.$",
    },
    ("backbone.norm", "model.pixel_level_module.encoder.hidden_states_norms.stage"): {
        "0.$": "1.$",
        "1.$": "2.$",
        "2.$": "3.$",
        "3.$": "4.$",
    },
    ("backbone.stages.#.blocks.#.", SWIN + "encoder.layers.#.blocks.#."): {
        "norm1.$": "layernorm_before.$",
        "norm2.$": "layernorm_after.$",
        "attn.w_msa.relative_position_bias_table": (
            "attention.relative_position_bias.relative_position_bias_table"
        ),
        "attn.w_msa.relative_position_index": None,  # follows from the window size, and is the same
        "attn.w_msa.qkv.$": "attention.{qkv}_proj.$",
        "attn.w_msa.proj.$": "attention.o_proj.$",
        "ffn.layers.0.0.$": "mlp.fc1.$",
        "ffn.layers.1.$": "mlp.fc2.$",
    },
    # Both sides count levels from the coarsest.
    ("panoptic_head.pixel_decoder.", PIXELS): {
        "input_convs.#.conv.$": "input_projections.#.0.$",
        "input_convs.#.gn.$": "input_projections.#.1.$",
        "level_encoding.weight": "level_embed",
        "lateral_convs.0.conv.weight": "adapter_1.0.weight",
        "lateral_convs.0.gn.$": "adapter_1.1.$",
        "output_convs.0.conv.weight": "layer_1.0.weight",
        "output_convs.0.gn.$": "layer_1.1.$",
        "mask_feature.$": "mask_projection.$",
    },
    ("panoptic_head.pixel_decoder.encoder.layers.#.", PIXELS + "encoder.layers.#."): {
        "attentions.0.sampling_offsets.$": "self_attn.sampling_offsets.$",
        "attentions.0.attention_weights.$": "self_attn.attention_weights.$",
        "attentions.0.value_proj.$": "self_attn.value_proj.$",
        "attentions.0.output_proj.$": "self_attn.output_proj.$",
        "norms.0.$": "self_attn_layer_norm.$",
        "ffns.0.layers.0.0.$": "fc1.$",
        "ffns.0.layers.1.$": "fc2.$",
        "norms.1.$": "final_layer_norm.$",
    },
    # A layer attends to the image first (attentions.0), then to the other queries (attentions.1).
    ("panoptic_head.transformer_decoder.layers.#.", QUERIES + "decoder.layers.#."): {
        "attentions.0.attn.in_proj_$": "cross_attn.in_proj_$",
        "attentions.0.attn.out_proj.$": "cross_attn.out_proj.$",
        "norms.0.$": "cross_attn_layer_norm.$",
        "attentions.1.attn.in_proj_$": "self_attn.{qkv}_proj.$",
        "attentions.1.attn.out_proj.$": "self_attn.out_proj.$",
        "norms.1.$": "self_attn_layer_norm.$",
        "ffns.0.layers.0.0.$": "fc1.$",
        "ffns.0.layers.1.$": "fc2.$",
        "norms.2.$": "final_layer_norm.$",
    },
    ("panoptic_head.", QUERIES): {
        "transformer_decoder.post_norm.$": "decoder.layernorm.$",
        "mask_embed.0.$": "decoder.mask_predictor.mask_embedder.0.0.$",
        "mask_embed.2.$": "decoder.mask_predictor.mask_embedder.1.0.$",
        "mask_embed.4.$": "decoder.mask_predictor.mask_embedder.2.0.$",
        "query_embed.weight": "queries_embedder.weight",
        "query_feat.weight": "queries_features.weight",
        "level_embed.weight": "level_embed.weight",
    },
    ("panoptic_head.cls_embed.", "class_predictor."): {"$": "$"},
}
# What transformers has on top: a norm that segmentation never reads, and the weights of a loss.
NOT_IN_MMDET = {SWIN + "layernorm.weight", SWIN + "layernorm.bias", "criterion.empty_weight"}


def rename(key: str) -> list[str]:
    """The names in transformers of an mmdetection key: one, three for a joint attention, or none.

    Raises:
        ValueError: when not exactly one rule matches.
    """
    matches: list[list[str]] = []
    for (theirs, ours), rules in RULES.items():
        for pattern, target in rules.items():
            expression = re.escape(theirs + pattern).replace(r"\#", r"(\d+)")
            match = re.fullmatch(expression.replace(r"\$", "(weight|bias)"), key)
            if match is None:
                continue
            name = ours + target if target else ""
            for part in match.groups() if target else ():
                name = re.sub(r"[#$]", part, name, count=1)
            names = [name.replace("{qkv}", part) for part in "qkv"] if "{qkv}" in name else [name]
            matches.append(names if target else [])
    if len(matches) != 1:
        raise ValueError(f"{key}: {len(matches)} rules")
    return matches[0]


def merging_order(weight: Tensor) -> Tensor:
    """(…, C x 4 neighbours) of `nn.Unfold` -> (…, 4 neighbours x C) of Swin."""
    neighbours = weight.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return neighbours[..., [0, 2, 1, 3], :].flatten(-2)


def from_mmdet(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder an mmdetection checkpoint.

    Args:
        weights: the checkpoint's `state_dict`.
        expected: state of the transformers model, whose names and shapes must come out.

    Raises:
        ValueError: listing keys without a rule, missing and doubled keys, and wrong shapes.
    """
    converted: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, weight in weights.items():
        try:
            names = rename(key)
        except ValueError as error:
            problems.append(str(error))
            continue
        parts = weight.chunk(3) if len(names) == 3 else [weight]
        for name, part in zip(names, parts, strict=False):  # no name: dropped
            if name in converted:
                problems.append(f"{name}: given twice")
            converted[name] = merging_order(part) if ".downsample." in name else part
    problems += [f"{name}: unknown to transformers" for name in converted.keys() - expected.keys()]
    problems += [f"{name}: missing" for name in expected.keys() - converted.keys() - NOT_IN_MMDET]
    for name in converted.keys() & expected.keys():
        found, wanted = tuple(converted[name].shape), tuple(expected[name].shape)
        if found != wanted:
            problems.append(f"{name}: shape {found}, expected {wanted}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise ValueError(
            "the checkpoint is not mmdetection's Mask2Former Swin-S for 80 classes: "
            f"{len(problems)} problems\n  {shown}"
        )
    return converted
