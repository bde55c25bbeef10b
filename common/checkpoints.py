"""Models named by users (run directory, checkpoint folder or hub id): finding and loading them."""

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
"""Where trainings write by default: `runs/x` is never a hub id, also while it is missing."""


def resolve_model(name: str | Path) -> str:
    """The model folder (with `config.json`) of `name`, or `name` itself when it is a hub id.

    A run directory holds its finished model in `model/`, before that the newest in `step-N/model`.
    Raises FileNotFoundError when `name` is neither a folder with a model nor a hub id.
    """
    folder = Path(name)
    if folder.is_dir():
        steps = [step / "model" for step in reversed(numbered(folder, "step"))]
        for candidate in (folder, folder / "model", *steps):
            if (candidate / "config.json").is_file():
                return str(candidate)
        raise FileNotFoundError(
            f"{folder} holds no model: neither config.json nor model/config.json nor step-N/model"
        )
    may_be_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and folder.parts[0] != OUTPUTS
    if may_be_on_hub and not folder.parent.is_dir():
        return str(name)
    raise FileNotFoundError(
        f"{name} does not exist: give a run directory, a checkpoint folder or a hub id (org/name)"
    )


def finished_stages(name: str | Path) -> dict[str, str]:
    """Every finished stage of a run directory, with its model folder, or the one that `name` is."""
    stages = {stage: Path(name) / stage / "model" for stage in ("stage1", "stage2")}
    found = {stage: str(folder) for stage, folder in stages.items() if folder.is_dir()}
    return found or {"model": resolve_model(name)}


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The folders `PREFIX-N` of checkpoints, by N."""
    found = [path for path in folder.glob(f"{prefix}-*") if path.name[len(prefix) + 1 :].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def local_model(name: str | Path) -> Path:
    """The folder that `resolve_model` finds; a hub id is downloaded first."""
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

    `kinds` are accepted values of `model_type`, which `expected` describes. Raises ValueError for
    another, FileNotFoundError for a hub id that is neither cached nor reachable.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise FileNotFoundError(
            f"{name} is not a folder here, and the hub gave no config.json: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if values.get("model_type") not in kinds:
        raise ValueError(f"{name} is a {values.get('model_type')!r} model, expected {expected}")
    return values


def load_model(kind: Any, name: str | Path, *, allow_unknown: bool = True, **options: Any) -> Any:
    """`kind.from_pretrained(name)`, refused where transformers would only warn.

    Raises ValueError, naming the first weights that are damaged, missing, of other shapes, not
    finite, or (without `allow_unknown`) have no place in the model.
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
    """Refuse, with ValueError, a model that holds a weight or buffer which is NaN or infinite."""
    name = first_nonfinite(model)
    if name is not None:
        raise ValueError(
            f"{source}: {name} holds values that are not finite, so the training that wrote it had "
            "diverged; take an earlier checkpoint, or train again with lower learning rates"
        )


def first_nonfinite(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer (ZeRO-3: local part) that is NaN or infinite."""
    tensors = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor = getattr(tensor, "ds_tensor", tensor).detach()
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            tensors[name] = tensor
    if not tensors:
        return None
    # The extremes carry a NaN along and need no copy of the tensor, as `isfinite` would. The host
    # waits for a GPU once for all of them.
    extremes = [torch.stack(tensor.aminmax()).float() for tensor in tensors.values()]
    together = torch.stack([pair.to(extremes[0].device) for pair in extremes])
    diverged = (~together.isfinite()).any(-1).tolist()
    return list(tensors)[diverged.index(True)] if any(diverged) else None


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters of a module, and those of them that are trained. ZeRO-3's parts count whole."""
    total = trained = 0
    for parameter in module.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        trained += size if parameter.requires_grad else 0
    return total, trained
