"""The projector in LLaVA's own file, `mm_projector.bin`."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vqrae.common.files import atomic_path

PROJECTOR = "multi_modal_projector."  # in the names of weights
PROJECTOR_FILE = "mm_projector.bin"
# LLaVA's nn.Sequential of linear, GELU, linear has names of its own for the same two layers.
PROJECTOR_NAMES = {
    "0.weight": "linear_1.weight",
    "0.bias": "linear_1.bias",
    "2.weight": "linear_2.weight",
    "2.bias": "linear_2.bias",
}


def save_projector(weights: dict[str, Tensor], path: str | Path) -> None:
    """Write the projector among the weights of a LLaVA as LLaVA-1.5 does, `mm_projector.bin`."""
    ours = {name.partition(PROJECTOR)[2]: weight for name, weight in weights.items()}
    state = {
        f"model.mm_projector.{theirs}": ours[name].detach().cpu().clone()
        for theirs, name in PROJECTOR_NAMES.items()
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(state, stream)  # given a path, it writes that into the file


def extract_projector(model: Path, path: Path) -> None:
    """Write the projector of a saved LLaVA folder as LLaVA's file."""
    weights: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            names = [name for name in stored.keys() if PROJECTOR in name]  # noqa: SIM118
            weights |= {name: stored.get_tensor(name) for name in names}
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
    # What precedes `mm_projector.` depends on the program that wrote the file.
    found = {
        name.rpartition("mm_projector.")[2]: value
        for name, value in stored.items()
        if "mm_projector." in name
    }
    if found.keys() != PROJECTOR_NAMES.keys():
        raise ValueError(
            f"{path}: got a projector with {', '.join(sorted(found)) or 'no weights'}, "
            f"expected {', '.join(PROJECTOR_NAMES)}"
        )
    expected = projector.state_dict()
    for theirs, name in PROJECTOR_NAMES.items():
        shape, wanted = tuple(found[theirs].shape), tuple(expected[name].shape)
        if shape != wanted:
            raise ValueError(
                f"{path}: {theirs} has shape {shape}, expected {wanted}: "
                "it was trained for another encoder or language model"
            )
        expected[name] = found[theirs]
    projector.load_state_dict(expected)
