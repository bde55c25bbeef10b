"""Put a tokenizer's encoder into InternVL3 in place of its vision tower: VQRAE's InternViT experiment, without any training
of the language model (arXiv 2511.23386, section 3.4 and B.3).

    vqrae graft --model OpenGVLab/InternVL3-8B-hf --tokenizer runs/internvit_448 --out runs/internvl3_vqrae

The weight files are rewritten one after the other, so an 8B model needs the memory of its largest file only. Every weight
outside of the tower, and every other file, is the original's.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, InternVLConfig, InternVLVisionConfig

from vqrae.common.checkpoints import local_model
from vqrae.common.files import atomic_path, weights_fingerprint, write_json
from vqrae.common.run import run_manifest
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.build import FINGERPRINT_KEY

TOWER = "vision_tower."
# What a vision configuration holds that its forward pass does not depend on once dropout is off.
WITHOUT_EFFECT = {
    "hidden_dropout_prob",
    "attention_dropout",
    "projection_dropout",
    "initializer_range",
}
WITHOUT_EFFECT |= {"layer_scale_init_value", "use_mask_token"}
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def graft(model: str | Path, tokenizer: str | Path, out: str | Path) -> Path:
    """Write `model` with the encoder of `tokenizer` as its vision tower to the folder `out`, whole or not at all.

    The new weights take the type of those they replace (bfloat16 in the released InternVL3). `config.json` gains the
    tokenizer's fingerprint, `manifest.json` holds those of all three parts.

    Args:
        model: an `InternVLForConditionalGeneration` folder or hub id (those that end in `-hf`).
        tokenizer: run directory, checkpoint folder or hub id.

    Raises:
        ValueError: naming both sides, when the model is no such model, or its tower is not what the encoder was made from:
            another architecture, other shapes, another normalisation of images, or other features.
        FileExistsError: when `out` exists.
    """
    source, donor, out = local_model(model), local_model(tokenizer), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: give another folder, or remove it")
    encoder = VQRAEModel.from_pretrained(donor)
    _require_same_tower(source, donor, encoder.config)
    tower = {f"{TOWER}{key}": tensor for key, tensor in encoder.encoder.state_dict().items()}
    shards = sorted(source.glob("*.safetensors"))
    _require_same_weights(shards, tower, source, donor)
    fingerprint = weights_fingerprint(donor)
    with atomic_path(out) as folder:
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.suffix not in OTHER_WEIGHTS:
                shutil.copyfile(file, folder / file.name)
        for shard in shards:
            _rewrite(shard, folder / shard.name, tower)
        config = json.loads((source / "config.json").read_text())
        write_json(folder / "config.json", config | {FINGERPRINT_KEY: fingerprint})
        parts = {
            "model": weights_fingerprint(source),
            "tokenizer": fingerprint,
            "result": weights_fingerprint(folder),
        }
        write_json(folder / "manifest.json", run_manifest(fingerprints=parts))
    return out


def _require_same_tower(source: Path, donor: Path, tokenizer: VQRAEConfig) -> None:
    """Refuse parts that would fit by shape and still compute something else."""
    kind = json.loads((source / "config.json").read_text()).get("model_type")
    if kind != InternVLConfig.model_type:
        raise ValueError(
            f"{source} is a {kind!r} model, expected 'internvl' (a hub id that ends in -hf)"
        )
    config, ours = InternVLConfig.from_pretrained(source), tokenizer.build_encoder_config()
    theirs = config.vision_config
    if not isinstance(ours, InternVLVisionConfig):
        raise ValueError(
            f"{donor} encodes with a {ours.model_type!r}, but the tower of {source} is {theirs.model_type!r}"
        )
    processor = AutoImageProcessor.from_pretrained(source)
    pairs = {
        "image_mean": (processor.image_mean, tokenizer.image_mean),
        "image_std": (processor.image_std, tokenizer.image_std),
    }
    own = {
        field.name
        for field in fields(InternVLVisionConfig)
        if field.name in InternVLVisionConfig.__annotations__
    }
    pairs |= {
        name: (getattr(theirs, name), getattr(ours, name)) for name in sorted(own - WITHOUT_EFFECT)
    }
    plain = {name: (_plain(a), _plain(b)) for name, (a, b) in pairs.items()}
    problems = [
        f"{name}: {source} has {a}, {donor} has {b}" for name, (a, b) in plain.items() if a != b
    ]
    read = (config.vision_feature_layer, config.vision_feature_select_strategy)
    if read != (-1, "default"):
        problems.append(
            f"{source} reads layer {read[0]} by {read[1]!r}, expected layer -1 by 'default'"
        )
    if not ours.use_mean_pooling and tokenizer.feature_tap != "last_hidden_state":
        problems.append(
            f"{source} reads last_hidden_state, {donor} has feature_tap {tokenizer.feature_tap}"
        )
    if problems:
        raise ValueError(
            "the tokenizer's encoder does not fit the model:\n  " + "\n  ".join(problems)
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _require_same_weights(
    shards: list[Path], tower: dict[str, Tensor], source: Path, donor: Path
) -> None:
    found = {name: shape for shard in shards for name, shape in _tower_shapes(shard)}
    if missing := sorted(found.keys() ^ tower.keys()):
        raise ValueError(
            f"the tower of {source} and the encoder of {donor} hold different weights: {missing[:5]} …"
        )
    for name, shape in found.items():
        if shape != tuple(tower[name].shape):
            raise ValueError(
                f"{name}: {source} has shape {shape}, {donor} has {tuple(tower[name].shape)}"
            )


def _tower_shapes(shard: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(shard, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (the file is no mapping)
            if TOWER in name:
                yield _tower_name(name), tuple(weights.get_slice(name).get_shape())


def _tower_name(name: str) -> str:
    """`model.vision_tower.x` and `vision_tower.x` are both found on disk, by age of the checkpoint."""
    return name[name.index(TOWER) :]


def _rewrite(shard: Path, target: Path, tower: dict[str, Tensor]) -> None:
    """Copy a weight file, its tower's weights from `tower` in the type of those they replace."""
    with safe_open(shard, framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        metadata = weights.metadata()
    for name, tensor in tensors.items():
        if TOWER in name:
            tensors[name] = tower[_tower_name(name)].to(tensor.dtype).contiguous()
    save_file(tensors, target, metadata=metadata)
