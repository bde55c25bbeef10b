"""A generator belongs to one visual tokenizer: recorded in its `config.json`, found, or refused."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vqrae.common import run as runs
from vqrae.common.checkpoints import local_model, resolve_model
from vqrae.common.files import read_json, require_same_tokenizer, weights_fingerprint
from vqrae.common.run import Run, RunConfig
from vqrae.common.trainer import checkpoints


def open_run(config: RunConfig, name: str | Path) -> tuple[Run, Path, str]:
    """A generator's run, with the folder and the fingerprint of the tokenizer that it trains with.

    Raises:
        ValueError: when the run holds a model of another tokenizer's codes, or other settings.
    """
    tokenizer, output = local_model(name), Path(config.output_dir)
    fingerprint = weights_fingerprint(tokenizer)
    for folder in (output / "model", *checkpoints(output)):
        if (folder / "config.json").is_file():
            found = read_json(folder / "config.json")["vqrae_tokenizer_fingerprint"]
            require_same_tokenizer(fingerprint, found, f"generator {folder}")
    run = runs.open(output, config, seed=config.seed, report_to=config.report_to)
    return run, tokenizer, fingerprint


def record_tokenizer(
    config: PreTrainedConfig, name: str | Path, fingerprint: str, folder: Path
) -> None:
    """Write the tokenizer `name` to the configuration of a generator that is saved in `folder`."""
    found = resolve_model(name)
    if Path(found).is_dir():  # else a hub id
        # A tree that holds both may then be moved or copied as a whole.
        found = os.path.relpath(Path(found).resolve(), folder.resolve())
    config.vqrae_tokenizer, config.vqrae_tokenizer_fingerprint = found, fingerprint


def own_tokenizer(folder: str, values: dict[str, Any], given: str | Path | None) -> Path:
    """The folder of the tokenizer that a model was trained with.

    Args:
        values: of the model's `config.json`.
        given: where it is, if not where `values` record it.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is another one.
    """
    recorded, fingerprint = values["vqrae_tokenizer"], values["vqrae_tokenizer_fingerprint"]
    try:
        found = local_model(given) if given else find_tokenizer(recorded, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"generator {folder} needs the visual tokenizer {given or recorded} (weights "
            f"{fingerprint[:16]}), which cannot be found: name its folder with tokenizer=..."
        ) from error
    artefact = f"generator {folder} (trained with {recorded}, asked to decode with {found})"
    require_same_tokenizer(weights_fingerprint(found), fingerprint, artefact)
    return found


def find_tokenizer(recorded: str, folder: str) -> Path:
    """The tokenizer's folder, from what the generator in `folder` recorded of it.

    Raises:
        FileNotFoundError: when it is neither there nor at that path, as older generators record it.
    """
    relative = Path(folder).resolve() / recorded
    return local_model(relative if relative.is_dir() else recorded)
