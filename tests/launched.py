"""What a module reads from its command line, without running it."""

import importlib
import sys
from typing import Any

import pytest

from vqrae.common import cli


class Accepted(Exception):
    """A module has read its arguments."""


def read(module: str, arguments: list[str]) -> Any:
    """The configuration that `main` of a module of vqrae reads."""
    found = []
    original = cli.parse

    def parse_and_stop(*given: Any, **options: Any) -> None:
        found.append(original(*given, **options))
        raise Accepted

    main = importlib.import_module(f"vqrae.{module}").main
    with pytest.MonkeyPatch.context() as patch:
        for name, loaded in list(sys.modules.items()):
            if name.startswith("vqrae.") and getattr(loaded, "parse", None) is original:
                patch.setattr(loaded, "parse", parse_and_stop)
        with pytest.raises(Accepted):
            main(arguments)
    return found[0]
