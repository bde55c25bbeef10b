"""The model that a user means (a run directory, a checkpoint folder or a hub id): finding it, loading it whole."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig

from vqrae.common.files import read_json, weights_fingerprint

OUTPUTS = "runs"
"""Where trainings write by default: `runs/x` is a folder, also while there is none."""


def resolve_model(name: str | Path) -> str:
    """The model folder (with `config.json`) behind `name`, or `name` itself when it is a hub id.

    A run directory holds its finished model in `model/`; while training, the newest `step-N/model` stands in.

    Raises:
        FileNotFoundError: when `name` is neither a folder with a model nor a hub id.
    """
    folder = Path(name)
    if folder.is_dir():
        steps = sorted(
            folder.glob("step-*"),
            key=lambda p: int(p.name.split("-")[1]) if p.name[5:].isdigit() else -1,
        )
        for candidate in (folder, folder / "model", *(step / "model" for step in reversed(steps))):
            if (candidate / "config.json").is_file():
                return str(candidate)
        raise FileNotFoundError(
            f"{folder} holds no model: neither config.json nor model/config.json nor step-N/model is there"
        )
    may_be_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and folder.parts[0] != OUTPUTS
    if may_be_on_hub and not folder.parent.is_dir():
        return str(name)
    raise FileNotFoundError(
        f"{name} does not exist: give a run directory, a checkpoint folder or a hub id such as org/name"
    )


def local_model(name: str | Path) -> Path:
    """The folder behind `name` as `resolve_model` finds it; a hub id is downloaded first."""
    resolved = resolve_model(name)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved))


def model_fingerprint(name: str | Path) -> str:
    """Identity of a model: the fingerprint of the weights in its folder; a hub id is its own."""
    folder = resolve_model(name)
    return weights_fingerprint(folder) if Path(folder).is_dir() else str(name)


def recorded_tokenizer(model: str | Path) -> str | None:
    """Fingerprint of the tokenizer that a generator or LLaVA folder records; None if unknown."""
    config = Path(resolve_model(model)) / "config.json"
    return read_json(config).get("vqrae_tokenizer_fingerprint") if config.is_file() else None


def require_kind(name: str | Path, kinds: Collection[str], expected: str) -> dict[str, Any]:
    """The values of a model's `config.json`, read before any of its weights.

    Args:
        name: what `resolve_model` returns.
        kinds: values of `model_type` that will do.
        expected: what they are, for the message.

    Raises:
        FileNotFoundError: for a hub id that is neither in the cache nor within reach.
        ValueError: for a model of another kind.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and its config.json could not be had from the hub: {str(error).splitlines()[0]}"
        ) from error
    if values.get("model_type") not in kinds:
        raise ValueError(f"{name} is a {values.get('model_type')!r} model, expected {expected}")
    return values


def load_model(kind: Any, name: str | Path, *, allow_unknown: bool = True, **options: Any) -> Any:
    """`kind.from_pretrained(name)` for weights that are all there and all finite; transformers only warns, or is silent.

    Args:
        kind: a model class of transformers, or an `Auto` class.
        allow_unknown: whether the folder may hold weights that the model has no place for.

    Raises:
        ValueError: naming the model and its first weights that are missing, of other shapes, unknown, or not finite.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = kind.from_pretrained(name, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are damaged: {error}") from error
    wrong = {
        "lacks weights of": report["missing_keys"],
        "has weights of other shapes than": [key for key, *_ in report["mismatched_keys"]],
        "has weights unknown to": [] if allow_unknown else report["unexpected_keys"],
    }
    for what, keys in wrong.items():
        if keys:
            raise ValueError(
                f"{name} {what} a {type(model).__name__}, {len(keys)} of them: "
                f"{', '.join(sorted(keys)[:3])}; take a folder that was written whole, whose "
                "config.json belongs to its weights"
            )
    require_finite(model, name)
    return model


def require_finite(model: nn.Module, source: str | Path) -> None:
    """Refuse a model that holds a weight or buffer which is NaN or infinite: all that it computes would be wrong.

    Args:
        source: how the user named the model.

    Raises:
        ValueError: naming the model and the first such tensor.
    """
    tensors = {
        name: tensor.detach()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel()
    }
    if not tensors:
        return
    # The extremes carry a NaN along and need no copy of the tensor, as `isfinite` would. A GPU is
    # waited for once for all of them.
    extremes = [torch.stack(tensor.aminmax()).float() for tensor in tensors.values()]
    together = torch.stack([pair.to(extremes[0].device) for pair in extremes])
    diverged = (~together.isfinite()).any(-1).tolist()
    if any(diverged):
        name = list(tensors)[diverged.index(True)]
        raise ValueError(
            f"{source}: {name} holds values that are not finite, so the training that wrote it had diverged; "
            "take an earlier checkpoint, or train again with lower learning rates"
        )
