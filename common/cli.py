"""Commands whose arguments are `key=value` for the fields of one dataclass, and their progress line."""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from vqrae.common.config import (
    ConfigError,
    apply_overrides,
    build_config,
    load_config,
    parse_yaml,
    shipped_config,
    shipped_names,
)
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


def read_run(
    cls: type[T], package: str, argv: Sequence[str] | None = None, *, section: str = ""
) -> Any:
    """Build dataclass `cls` from `CONFIG [key.path=value …]`, as the training modules take it.

    Args:
        package: whose `configs/` holds the names that CONFIG may be.
        argv: the arguments; those of the process when not given.
        section: field of `cls` that the keys belong to and that is returned in place of the whole.

    Raises:
        SystemExit: 0 after `--help`, which prints the fields.
        ConfigError: for arguments that cannot be used.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        part = typing.get_type_hints(cls)[section] if section else cls
        print(
            usage(
                part,
                f"CONFIG: {', '.join(_configurations(cls, package))}, or a FILE.yaml; key=value changes it.",
            )
        )
        raise SystemExit(0)
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        given = f"got {arguments[0]!r}" if arguments else "got no argument"
        names = ", ".join(_configurations(cls, package))
        raise ConfigError(
            f"{given}, expected CONFIG [key=value ...] where CONFIG is {names} or a FILE.yaml; see --help"
        )
    name, *overrides = arguments
    prefix = f"{section}." if section else ""
    config = load_config(
        cls, shipped_config(package, name), [prefix + override for override in overrides]
    )
    return getattr(config, section) if section else config


def _configurations(cls: type, package: str) -> list[str]:
    """Names of the shipped configurations that have the fields of `cls`."""
    fields = {field.name for field in dataclasses.fields(cls)}
    files = {name: shipped_config(package, name) for name in shipped_names(package)}
    return [
        name
        for name, file in files.items()
        if fields.issuperset(parse_yaml(file.read_text(encoding="utf-8")))
    ]


def usage(cls: type, config: str = "") -> str:
    """What `--help` prints: the module of `cls`, its docstring, and one line per field, those of sections included.

    Args:
        config: what there is to say of the argument CONFIG, where the command takes one.
    """
    main = sys.modules["__main__"].__spec__
    name = main.name if main and main.name.startswith("vqrae.") else cls.__module__
    lines = [f"usage: python -m {name} {'CONFIG ' if config else ''}[key=value ...]", ""]
    lines += [textwrap.dedent(cls.__doc__ or "").strip(), *([config] if config else []), ""]
    rows = list(_field_rows(cls, "", {}))
    width = max(len(key) for key, _ in rows) + 2
    return "\n".join(lines + [f"  {key:<{width}}{text}" for key, text in rows])


def _field_rows(cls: type, prefix: str, shown: dict[Any, str]) -> Iterator[tuple[str, str]]:
    """(key, meaning with type and default) of every field; a section is followed by its own fields, once for its type."""
    documents, hints = field_docstrings(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, annotation = prefix + field.name, hints[field.name]
        sections = [
            kind
            for kind in (annotation, *typing.get_args(annotation))
            if dataclasses.is_dataclass(kind)
        ]
        known = "".join(f" Keys as those of {shown[kind]}." for kind in sections if kind in shown)
        text = " ".join(documents.get(field.name, "").split()) + known
        yield key, f"{text} ({_default(field, annotation)})".strip()
        for kind in sections:
            if kind not in shown:
                shown[kind] = key
                yield from _field_rows(typing.cast(type, kind), f"{key}.", shown)


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
    kind = _kind(annotation)
    if field.default is not dataclasses.MISSING:
        return f"{kind}; default: {field.default}"
    if field.default_factory is dataclasses.MISSING:
        return f"{kind}; required"
    value = field.default_factory()
    return kind if dataclasses.is_dataclass(value) else f"{kind}; default: {value}"


def _kind(annotation: Any) -> str:
    """A type as people write it: `int | None`, `a | b` for the words of a Literal, `section` for a dataclass."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(_kind, arguments))
    if dataclasses.is_dataclass(annotation):
        return "section"
    if annotation is type(None):
        return "null"
    return (
        getattr(annotation, "__name__", str(annotation))
        if not arguments
        else str(annotation).replace("typing.", "")
    )


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
