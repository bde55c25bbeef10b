"""What there is to show: the models of a run directory, a folder or a hub id, by what they do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vqrae.common.checkpoints import local_model, resolve_model
from vqrae.demo.visitors import public
from vqrae.generation.generator import Generator
from vqrae.generation.multi_code import GENERATORS
from vqrae.mllm.inference import open_chat, open_generator
from vqrae.mllm.modeling import UnifiedConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.chat import Chat

QUICKSTART = "bash scripts/quickstart.sh makes all three in runs/quickstart"
ROLES = {
    "tokenizer": ("tokenizer", "bash scripts/train_tokenizer.sh"),
    "chat": ("understanding model", "bash scripts/train_llava.sh"),
    "generator": ("generator", "bash scripts/train_ar_gen.sh"),
}
"""What models do on the page: how people call such a model, and the command that makes one."""


@dataclass
class Models:
    """What was found; None where there is no such model."""

    tokenizer: VQRAEModel | None = None
    chat: Chat | None = None
    generator: Generator | None = None
    refused: dict[str, str] = field(default_factory=dict)
    """Why a model that is there could not be opened, by its role."""

    def missing(self, role: str) -> str:
        """What a visitor reads where there is no model of a role; empty where there is one."""
        if getattr(self, role) is not None:
            return ""
        kind, command = ROLES[role]
        why = self.refused.get(role, f"there is no {kind} here")
        return f"{why}; `{command}` makes one"


def open_models(names: Sequence[str | Path], *, device: str = "cpu") -> Models:
    """Open the first model of each role.

    Args:
        names: model folders, hub ids, run directories, or folders of run directories such as the
            quickstart's. A generator brings its visual tokenizer along.

    Raises:
        FileNotFoundError: for a name that leads to no model of ours.
    """
    models = Models()
    # A unified model does two jobs: it comes after those that do one.
    found = sorted(find_models(names), key=lambda pair: len(pair[1]))
    for path, roles in found:
        for role in roles:
            if getattr(models, role) is not None:
                continue
            try:
                setattr(models, role, open_as(role, path, device))
            except (ValueError, OSError) as error:
                models.refused.setdefault(role, public(error))
    if models.tokenizer is None and models.generator is not None:
        models.tokenizer = models.generator.tokenizer
    return models


def open_as(role: str, path: str, device: str) -> Any:
    """The model at a path, ready for its role."""
    if role == "tokenizer":
        return VQRAEModel.from_pretrained(local_model(path)).eval().to(device)
    opener = open_chat if role == "chat" else open_generator
    return opener(path, device=device)


def find_models(names: Sequence[str | Path]) -> list[tuple[str, tuple[str, ...]]]:
    """Every model that these names lead to, with its roles."""
    found = []
    for name in names:
        folder = Path(name)
        try:
            paths = [resolve_model(name)]
        except FileNotFoundError as error:
            if not folder.is_dir():
                raise FileNotFoundError(f"{error}; {QUICKSTART}") from error
            paths = runs_in(folder)
        several = [(path, roles_of(path)) for path in paths]
        usable = [(path, roles) for path, roles in several if roles]
        if not usable:
            raise FileNotFoundError(
                f"{name} holds no tokenizer, no understanding model and no generator; {QUICKSTART}"
            )
        found += usable
    return found


def runs_in(folder: Path) -> list[str]:
    """The models of the run directories in a folder."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            found += [resolve_model(path)] if path.is_dir() else []
        except FileNotFoundError:  # not a run, or one that has not finished
            continue
    return found


def roles_of(path: str) -> tuple[str, ...]:
    """What a model can do here, from its `config.json`.

    Raises:
        FileNotFoundError: for a hub id that is neither cached nor reachable.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{path}: no config.json could be read: {reason}") from error
    kind = values.get("model_type")
    if kind == "vqrae":
        return ("tokenizer",)
    if kind == UnifiedConfig.model_type:
        return ("chat", "generator")
    if kind in GENERATORS:
        return ("generator",) if "visual_vocabulary" in values else ()
    return ("chat",) if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else ()
