"""Asking a judge about many images: answers are kept, failures are named."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from vqrae.common.files import read_json, sha256, write_json
from vqrae.eval.sharding import map_shared

T = TypeVar("T")


def ask_all(
    images: Mapping[str, Path | None], ask: Callable[[str, Path], T], folder: Path
) -> tuple[dict[str, T], dict[str, str]]:
    """What `ask` gives for each name and its image, and the reason for each that has nothing.

    Processes share the work, and all get all. `folder` keeps NAME.json, so that an interrupted run
    asks only the rest; another image is asked about again. What `ask` gives is JSON.
    """

    def outcome(name: str) -> tuple[T | None, str]:
        image = images[name]
        if image is None:
            return None, "no image"
        kept, identity = folder / f"{name}.json", sha256(image)
        if kept.is_file() and (stored := read_json(kept))["image"] == identity:
            return stored["answers"], ""
        try:
            answers = ask(name, image)
        except (ValueError, RuntimeError, OSError) as error:
            return None, f"{type(error).__name__}: {error}"
        write_json(kept, {"image": identity, "answers": answers})
        return answers, ""

    names = list(images)
    given: dict[str, T] = {}
    failed: dict[str, str] = {}
    for name, (answers, reason) in zip(names, map_shared(outcome, names, "answers"), strict=True):
        if answers is None:
            failed[name] = reason
        else:
            given[name] = answers
    return given, failed
