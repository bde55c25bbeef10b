"""Put a tokenizer's encoder into InternVL3 in place of its vision tower, without training anything:
VQRAE's InternViT experiment (arXiv 2511.23386, section 3.4 and B.3).

    vqrae graft --model OpenGVLab/InternVL3-8B-hf --tokenizer runs/internvit_448 --out runs/grafted

Weight files are rewritten one after the other, so an 8B model needs the memory of its largest file.
Every weight outside of the tower, and every other file, is the original's.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, InternVLConfig, InternVLVisionConfig

from vqrae.common.checkpoints import local_model, require_kind
from vqrae.common.files import atomic_path, read_json, weights_fingerprint, write_json
from vqrae.common.run import run_manifest
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.build import FINGERPRINT_KEY

TOWER = "vision_tower."
# Fields of a vision configuration without effect on its forward pass once dropout is off.
WITHOUT_EFFECT = {
    "hidden_dropout_prob",
    "attention_dropout",
    "projection_dropout",
    "initializer_range",
    "layer_scale_init_value",
    "use_mask_token",
}
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def graft(model: str | Path, tokenizer: str | Path, out: str | Path) -> Path:
    """Write `model` with the encoder of `tokenizer` as its vision tower to a new folder `out`.

    The new weights take the type of those they replace (bfloat16 in the released InternVL3).
    `config.json` gains the tokenizer's fingerprint, `manifest.json` holds those of all three parts.

    Args:
        model: an `InternVLForConditionalGeneration` folder or hub id (those that end in `-hf`).
        tokenizer: run directory, checkpoint folder or hub id.

    Raises:
        ValueError: naming both sides, when the model is not InternVL, or its tower is not what the
            encoder was made from: another architecture, other shapes, another normalisation of
            images, or other features.
        FileExistsError: when `out` exists.
    """
    source, donor = local_model(model), local_model(tokenizer)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: give another folder, or remove it")
    require_kind(source, {InternVLConfig.model_type}, "'internvl' (a hub id that ends in -hf)")
    encoder = VQRAEModel.from_pretrained(donor)
    require_same_tower(source, donor, encoder.config)
    tower = encoder.encoder.state_dict()
    shards = sorted(source.glob("*.safetensors"))
    require_same_weights(shards, tower, source, donor)
    fingerprint = weights_fingerprint(donor)
    with atomic_path(out) as folder:
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.suffix not in OTHER_WEIGHTS:
                shutil.copyfile(file, folder / file.name)
        for shard in shards:
            with safe_open(shard, framework="pt") as weights:
                names = weights.keys()
                tensors = {name: weights.get_tensor(name) for name in names}
                metadata = weights.metadata()
            for name, tensor in tensors.items():
                if TOWER in name:
                    tensors[name] = tower[tower_name(name)].to(tensor.dtype).contiguous()
            save_file(tensors, folder / shard.name, metadata=metadata)
        config = read_json(source / "config.json")
        write_json(folder / "config.json", config | {FINGERPRINT_KEY: fingerprint})
        parts = {
            "model": weights_fingerprint(source),
            "tokenizer": fingerprint,
            "result": weights_fingerprint(folder),
        }
        write_json(folder / "manifest.json", run_manifest(fingerprints=parts))
    return out


def require_same_tower(source: Path, donor: Path, tokenizer: VQRAEConfig) -> None:
    """Refuse parts that would fit by shape and still compute something else."""
    config, ours = InternVLConfig.from_pretrained(source), tokenizer.build_encoder_config()
    theirs = config.vision_config
    if not isinstance(ours, InternVLVisionConfig):
        raise ValueError(
            f"{donor} encodes with a {ours.model_type!r}, "
            f"but the tower of {source} is {theirs.model_type!r}"
        )
    processor = AutoImageProcessor.from_pretrained(source)
    compared: dict[str, tuple[Any, Any]] = {
        "image_mean": (processor.image_mean, tokenizer.image_mean),
        "image_std": (processor.image_std, tokenizer.image_std),
    }
    for name in sorted(InternVLVisionConfig.__annotations__.keys() - WITHOUT_EFFECT):
        if hasattr(ours, name):
            compared[name] = (getattr(theirs, name), getattr(ours, name))
    problems = []
    for name, pair in compared.items():
        a, b = (list(value) if isinstance(value, tuple) else value for value in pair)
        if a != b:
            problems.append(f"{name}: {source} has {a}, {donor} has {b}")
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if (layer, strategy) != (-1, "default"):
        problems.append(f"{source} reads layer {layer} by {strategy!r}, expected -1 by 'default'")
    if not ours.use_mean_pooling and tokenizer.feature_tap != "last_hidden_state":
        problems.append(
            f"{source} reads last_hidden_state, {donor} has feature_tap {tokenizer.feature_tap}"
        )
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"the tokenizer's encoder does not fit the model:\n  {listed}")


def require_same_weights(
    shards: list[Path], tower: dict[str, Tensor], source: Path, donor: Path
) -> None:
    """Refuse a tower whose weights have other names or shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as weights:
            names = [name for name in weights.keys() if TOWER in name]  # noqa: SIM118
            found |= {tower_name(n): tuple(weights.get_slice(n).get_shape()) for n in names}
    if missing := sorted(found.keys() ^ tower.keys()):
        raise ValueError(
            f"the tower of {source} and the encoder of {donor} hold different weights: "
            f"{missing[:5]} …"
        )
    for name, shape in found.items():
        expected = tuple(tower[name].shape)
        if shape != expected:
            raise ValueError(f"{name}: {source} has shape {shape}, {donor} has {expected}")


def tower_name(name: str) -> str:
    """Name inside of the tower; on disk it follows `model.vision_tower.` or `vision_tower.`."""
    return name.partition(TOWER)[2]
