"""Commands whose arguments are `key=value` for the fields of one dataclass, and their progress line."""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vqrae.common.config import ConfigError, apply_overrides, build_config
from vqrae.common.run import format_duration

T = TypeVar("T")


def parse_arguments(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """Build dataclass `cls` from `key.path=value` arguments; `--help` prints its fields with docstrings and defaults.

    Args:
        argv: the arguments; those of the process when not given.

    Raises:
        SystemExit: 0 after `--help`; 2 after a message for arguments that cannot be used, all problems in one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(usage(cls))
        raise SystemExit(0)
    try:
        return build_config(cls, apply_overrides({}, arguments), source="command line")
    except ConfigError as error:
        print(f"{error}\nRun with --help for all keys.", file=sys.stderr)
        raise SystemExit(2) from None


def usage(cls: type) -> str:
    """What `--help` prints: the module of `cls`, its docstring, and one line per field."""
    main = sys.modules[cls.__module__]
    name = main.__spec__.name if main.__spec__ else cls.__module__
    documents, hints = field_docstrings(cls), typing.get_type_hints(cls)
    lines = [f"usage: python -m {name} [key=value ...]", "", textwrap.dedent(cls.__doc__ or "").strip(), ""]
    fields = dataclasses.fields(cls)
    width = max(len(field.name) for field in fields) + 2
    for field in fields:
        text = " ".join(documents.get(field.name, "").split())
        lines.append(f"  {field.name:<{width}}{text} ({_default(field, hints[field.name])})".replace("  (", " ("))
    return "\n".join(lines)


def field_docstrings(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, base classes included."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = typing.cast(ast.ClassDef, definition).body
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                value = following.value if isinstance(following, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[statement.target.id] = value.value
    return found


def _default(field: dataclasses.Field, annotation: Any) -> str:
    kind = " | ".join(map(str, typing.get_args(annotation))) if typing.get_origin(annotation) is typing.Literal else ""
    prefix = f"{kind}; " if kind else ""
    if field.default is not dataclasses.MISSING:
        return f"{prefix}default: {field.default}"
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            pairs = ", ".join(f"{field.name}.{key}={item}" for key, item in dataclasses.asdict(value).items())
            return f"{prefix}default: {pairs}"
        return f"{prefix}default: {value}"
    return f"{prefix}required"


def progress_line(label: str) -> Callable[[int, int], None]:
    """A function of (done, total) that shows progress and time left: in place on a terminal, else at every tenth."""
    begin, shown = time.monotonic(), -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        terminal, tenth = sys.stderr.isatty(), 10 * done // max(total, 1)
        if not terminal and tenth == shown:
            return
        shown = tenth
        left = format_duration((time.monotonic() - begin) / max(done, 1) * (total - done))
        line = f"{label} {done}/{total}  {left} left"
        end = "" if terminal and done < total else "\n"
        print(f"\r\033[K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)

    return show
