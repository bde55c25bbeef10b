"""Finding the model that a user means: a run directory, a checkpoint folder or a hub id."""

import re
from pathlib import Path

from torch import nn


def resolve_model(name: str | Path) -> str:
    """The model folder (with `config.json`) behind `name`, or `name` itself when it is a hub id.

    A run directory holds its finished model in `model/`; while training, the newest `step-N/model` stands in.

    Raises:
        FileNotFoundError: when `name` is neither a folder with a model nor a hub id.
    """
    folder = Path(name)
    if folder.is_dir():
        steps = sorted(folder.glob("step-*"), key=lambda p: int(p.name.split("-")[1]) if p.name[5:].isdigit() else -1)
        for candidate in (folder, folder / "model", *(step / "model" for step in reversed(steps))):
            if (candidate / "config.json").is_file():
                return str(candidate)
        raise FileNotFoundError(f"{folder} holds no model: neither config.json nor model/config.json nor step-N/model is there")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.parent.is_dir():
        return str(name)
    raise FileNotFoundError(f"{name} does not exist: give a run directory, a checkpoint folder or a hub id such as org/name")


def local_model(name: str | Path) -> Path:
    """The folder behind `name` as `resolve_model` finds it; a hub id is downloaded first."""
    resolved = resolve_model(name)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved))


def require_finite(model: nn.Module, source: str) -> None:
    """Refuse a model that holds a weight or buffer which is NaN or infinite: all that it computes would be wrong.

    Args:
        source: how the user named the model.

    Raises:
        ValueError: naming the model and the first such tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # The extremes carry a NaN along and need no copy of the tensor, as `isfinite` would.
        if not all(value.isfinite() for value in tensor.detach().aminmax()):
            raise ValueError(
                f"{source}: {name} holds values that are not finite, so the training that wrote it had diverged; "
                "take an earlier checkpoint, or train again with lower learning rates"
            )
