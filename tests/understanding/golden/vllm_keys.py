"""Which weights of a LLaVA folder vLLM's own loader takes: writes `vllm_keys.json`.

    python tests/understanding/golden/vllm_keys.py VLLM LLAVA

VLLM is vLLM's source (an unpacked wheel), LLAVA a folder of the tests' tiny model. Its loader and
tables of names are cut out of its files and run as they are; only the modules that they fill are
replaced, by empty ones of the same names. The language model, whose class takes the names of
released checkpoints, is left out.
"""

import ast
import itertools
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LANGUAGE_MODEL = "language_model."
TOWER_LAYER = ("self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
TOWER_LAYER = (*TOWER_LAYER, "layer_norm1", "layer_norm2")


def cut(source: str, *names: str) -> Iterator[str]:
    """The text of some classes."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            decorators = "".join(f"@{ast.unparse(each)}\n" for each in node.decorator_list)
            text = ast.get_source_segment(source, node)
            yield f"from __future__ import annotations\n{decorators}{text}"


def table(source: str, name: str, scope: dict[str, Any]) -> Any:
    """The `hf_to_vllm_mapper` of a class."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    [owner] = [node for node in classes if node.name == name]
    for node in owner.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "hf_to_vllm_mapper":
            return eval(ast.unparse(node.value), scope)
    raise ValueError(f"{name} has no hf_to_vllm_mapper")


class Parts(nn.Module):
    """Empty modules with these parameters."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        top = lambda name: name.split(".", 1)[0]  # noqa: E731
        for first, group in itertools.groupby(sorted(names), key=top):
            rest = [name.partition(".")[2] for name in group]
            if rest == [""]:
                parameter = nn.Parameter(torch.empty(0))
                parameter.weight_loader = lambda param, weight: None  # type: ignore[attr-defined]
                self.register_parameter(first, parameter)
            else:
                self.add_module(first, Parts(rest))


def loader_of(vllm: Path) -> tuple[dict[str, Any], Any, Any]:
    models = vllm / "vllm" / "model_executor" / "models"
    scope: dict[str, Any] = {
        "nn": nn, "torch": torch, "itertools": itertools, "re": re, "Iterable": Iterable,
        "Mapping": Mapping, "Any": Any,
        "dataclass": dataclass, "field": field, "logger": logging.getLogger("vllm"),
        "ShardIds": Any,
        "StageMissingLayer": type("StageMissingLayer", (nn.Module,), {}),
        "PPMissingLayer": type("PPMissingLayer", (nn.Module,), {}),
        "_get_tied_embedding_params": lambda module: {},
        "support_quantized_model_reload_from_hp_weights": lambda function: function,
        "default_weight_loader": lambda param, weight: None,
        "maybe_prefix": lambda prefix, name: name if not prefix else f"{prefix}.{name}",
    }  # fmt: skip
    for text in cut((models / "utils.py").read_text(), "WeightsMapper", "AutoWeightsLoader"):
        exec(text, scope)
    llava = table((models / "llava.py").read_text(), "LlavaForConditionalGeneration", scope)
    siglip = table((models / "siglip.py").read_text(), "SiglipVisionTransformer", scope)
    # LLaVA's tower is built without post-norm and pooling head, which the class then drops.
    dropped = scope["WeightsMapper"](orig_to_new_prefix={"post_layernorm.": None, "head.": None})
    return scope, llava, siglip | dropped


def load(vllm: Path, weights: Mapping[str, Tensor], layers: int) -> list[str]:
    """The names of vLLM's parameters that got a weight.

    Raises:
        ValueError: vLLM's own, for a weight that it has no place for.
    """
    scope, llava_table, siglip_table = loader_of(vllm)
    parts = itertools.product(range(layers), TOWER_LAYER, ("weight", "bias"))
    each = [f"encoder.layers.{i}.{name}.{kind}" for i, name, kind in parts]
    embeddings = ["patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight"]
    transformer = Parts([*each, *(f"embeddings.{name}" for name in embeddings)])
    loader = scope["AutoWeightsLoader"]
    transformer.load_weights = partial(loader(transformer).load_weights, mapper=siglip_table)
    linear = itertools.product((1, 2), ("weight", "bias"))
    root = Parts(f"multi_modal_projector.linear_{i}.{kind}" for i, kind in linear)
    root.vision_tower, root.language_model = nn.Module(), nn.Module()
    root.vision_tower.vision_model = transformer
    root.language_model.load_weights = lambda found: {name for name, _ in found}
    return sorted(loader(root).load_weights(iter(weights.items()), mapper=llava_table))


def main(vllm: Path, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    layers = json.loads((folder / "config.json").read_text())["vision_config"]["num_hidden_layers"]
    folder_name = next(vllm.glob("vllm-*.dist-info")).name
    version = folder_name.removesuffix(".dist-info").removeprefix("vllm-")
    loaded = [name for name in load(vllm, weights, layers) if not name.startswith(LANGUAGE_MODEL)]
    keys = sorted(name for name in weights if not name.startswith(LANGUAGE_MODEL))
    golden = SimpleNamespace(vllm=version, keys=keys, loaded=loaded)
    without = {}
    for key, value in weights.items():
        without[key.replace("vision_tower.vision_model.", "vision_tower.")] = value
    try:
        load(vllm, without, layers)
        golden.refused = ""
    except ValueError as error:
        golden.refused = str(error).split(". ")[0]
    text = json.dumps(vars(golden), indent=1) + "\n"
    Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"vLLM {version}: {len(golden.keys)} weights, {len(golden.loaded)} names filled")
    print(f"without vision_model: {golden.refused}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
