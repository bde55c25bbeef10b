"""What stands beside every score: the code, the packages, and whatever decides the number."""

from pathlib import Path
from typing import Any

from vqrae.common.checkpoints import resolve_model
from vqrae.common.files import read_json, weights_fingerprint
from vqrae.common.run import run_manifest


def score_manifest(**decides: Any) -> dict[str, Any]:
    """The manifest of a score.

    Args:
        decides: model fingerprints, sampling, protocol, judge, suite …
    """
    return {**run_manifest(), **decides}


def model_fingerprint(name: str) -> str:
    """Fingerprint of the weights behind a run directory or folder; a hub id is its own."""
    folder = resolve_model(name)
    return weights_fingerprint(folder) if Path(folder).is_dir() else name


def tokenizer_fingerprint(model: str) -> str | None:
    """Fingerprint of the visual tokenizer that a generator or understanding model records; None where that is not known."""
    config = Path(resolve_model(model)) / "config.json"
    return read_json(config).get("vqrae_tokenizer_fingerprint") if config.is_file() else None
