"""What stands beside every score: the code, the packages, and whatever decides the number."""

from typing import Any

from vqrae.common.checkpoints import model_fingerprint as model_fingerprint
from vqrae.common.checkpoints import recorded_tokenizer as tokenizer_fingerprint  # noqa: F401
from vqrae.common.run import run_manifest


def score_manifest(**decides: Any) -> dict[str, Any]:
    """The manifest of a score.

    Args:
        decides: model fingerprints, sampling, protocol, judge, suite …
    """
    return {**run_manifest(), **decides}
