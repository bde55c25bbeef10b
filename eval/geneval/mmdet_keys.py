"""Weights of mmdetection's Mask2Former with Swin, renamed for transformers by mmdet_keys.yaml.

A key without a rule, a missing one and a wrong shape are errors. In addition to names, two things
differ. mmdetection keeps query, key and value of an attention in one matrix where transformers has
three. And its patch merging unfolds 2 x 2 neighbours channel by channel, (top left, top right,
bottom left, bottom right) of each, where Swin has the channels of one neighbour after the other,
(top left, bottom left, top right, bottom right): loaded in the wrong order, a detector is nearly
blind."""

import re
from collections.abc import Mapping
from importlib import resources

import yaml
from torch import Tensor

SWIN = "model.pixel_level_module.encoder.swin."
_TABLE = resources.files("vqrae.eval.geneval") / "mmdet_keys.yaml"
# What transformers has on top: a norm that segmentation never reads, and the weights of a loss.
NOT_IN_MMDET = {SWIN + "layernorm.weight", SWIN + "layernorm.bias", "criterion.empty_weight"}


def read_rules() -> list[tuple[str, str | None]]:
    """Regular expressions for mmdetection's keys, and the names in transformers."""
    rules = []
    for part in yaml.safe_load(_TABLE.read_text(encoding="utf-8")):
        for key, target in part["keys"].items():
            pattern = re.escape(part["theirs"] + key).replace(r"\#", r"(\d+)")
            pattern = pattern.replace(r"\$", "(weight|bias)")
            rules.append((pattern, None if target is None else part["ours"] + target))
    return rules


def rename(key: str, rules: list[tuple[str, str | None]]) -> list[str]:
    """The names in transformers of a key: one, three for a joint attention, or none.

    Raises ValueError when not exactly one rule matches.
    """
    matches = [(m, target) for pattern, target in rules if (m := re.fullmatch(pattern, key))]
    if len(matches) != 1:
        raise ValueError(f"{key}: {len(matches)} rules")
    [(match, name)] = matches
    if name is None:
        return []
    for part in match.groups():
        name = re.sub(r"[#$]", part, name, count=1)
    return [name.replace("{qkv}", part) for part in "qkv"] if "{qkv}" in name else [name]


def merging_order(weight: Tensor) -> Tensor:
    """(…, C x 4 neighbours) of `nn.Unfold` -> (…, 4 neighbours x C) of Swin."""
    neighbours = weight.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return neighbours[..., [0, 2, 1, 3], :].flatten(-2)


def from_mmdet(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder an mmdetection checkpoint into the names and shapes of `expected`.

    Raises ValueError, listing keys without a rule, missing and doubled keys, and wrong shapes.
    """
    rules = read_rules()
    converted: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, weight in weights.items():
        try:
            names = rename(key, rules)
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
