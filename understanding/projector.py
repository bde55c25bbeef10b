"""The projector in LLaVA's own file, `mm_projector.bin`, in and out.

LLaVA-1.5 writes `torch.save({"model.mm_projector.0.weight": …})`, an `nn.Sequential` of linear, GELU, linear; transformers
calls the same two layers `linear_1` and `linear_2`.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vqrae.common.files import atomic_path

PROJECTOR = "multi_modal_projector."  # in the names of weights
PROJECTOR_FILE = "mm_projector.bin"
NAMES = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in (("0", "linear_1"), ("2", "linear_2"))
    for kind in ("weight", "bias")
}
"""LLaVA's name of a weight behind `mm_projector.` -> its name in `LlavaMultiModalProjector`."""


def save_projector(weights: dict[str, Tensor], path: str | Path) -> None:
    """Write a projector's state dict as LLaVA's file."""
    state = {
        f"model.mm_projector.{theirs}": weights[ours].detach().cpu().clone()
        for theirs, ours in NAMES.items()
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(state, stream)  # given a path, it writes that into the file


def extract_projector(model: Path, path: Path) -> None:
    """Write the projector of a saved LLaVA folder as LLaVA's file."""
    weights: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            ours = [name for name in stored.keys() if PROJECTOR in name]  # noqa: SIM118
            weights |= {name.partition(PROJECTOR)[2]: stored.get_tensor(name) for name in ours}
    save_projector(weights, path)


def load_projector(projector: nn.Module, path: str | Path) -> None:
    """Put the weights of LLaVA's file into a `LlavaMultiModalProjector`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds no two-layer projector, or one of other widths.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"projector {path} does not exist: give the mm_projector.bin of a LLaVA pretraining"
        )
    stored = torch.load(path, map_location="cpu", weights_only=True)
    found = {
        name.rpartition("mm_projector.")[2]: value
        for name, value in stored.items()
        if "mm_projector." in name
    }
    if found.keys() != NAMES.keys():
        raise ValueError(
            f"{path}: got a projector with {', '.join(sorted(found)) or 'no weights'}, expected {', '.join(NAMES)}"
        )
    weights, expected = (
        {NAMES[name]: value for name, value in found.items()},
        projector.state_dict(),
    )
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}: "
                "it was trained for another encoder or language model"
            )
    projector.load_state_dict(weights)
