"""The one command-line parser: `key=value` and `--key value` set the fields of a dataclass."""

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
from typing import Any, NamedTuple, TypeVar

from vqrae.common.config import (
    Argument,
    ConfigError,
    build_config,
    did_you_mean,
    read_yaml,
    set_value,
    shipped_config,
    shipped_names,
    split_override,
    union_members,
)
from vqrae.common.run import format_duration

T = TypeVar("T")


@typing.overload
def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    package: str | None = None,
    positional: Sequence[str] = (),
    program: str = "",
) -> T: ...
@typing.overload
def parse(
    cls: type, argv: Sequence[str] | None = None, *, package: str, section: str, program: str = ""
) -> Any: ...
def parse(
    cls: type,
    argv: Sequence[str] | None = None,
    *,
    package: str | None = None,
    section: str = "",
    positional: Sequence[str] = (),
    program: str = "",
) -> Any:
    """Build dataclass `cls` from the command line.

    `key.path=value` and `--key.path value`, `--key.path=value`, `--flag` mean the same. Dashes are
    underscores, and a flag may be the last part of a path where that is unique. A flag of a list
    may be given several times.

    Args:
        argv: the arguments; those of the process when not given.
        package: the first bare argument names a YAML file of its `configs/`, or is FILE.yaml.
        section: field of `cls` that the keys belong to, and that is returned instead of the whole.
        positional: fields that bare arguments fill in this order; a list takes all that are left.
        program: what the usage line calls the command; by default the module that is run.

    Raises SystemExit, 0 after `--help`, which prints the fields with types, defaults and meaning;
    ConfigError for arguments that cannot be used, naming all problems.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    part: type = typing.get_type_hints(cls)[section] if section else cls
    names = _configurations(cls, package) if package else []
    if "-h" in arguments or "--help" in arguments:
        print(usage(part, configs=names, positional=positional, program=program))
        raise SystemExit(0)
    bare, given = _read(arguments, part)
    values: dict[str, Any] = {}
    source = "command line"
    if package:
        if not bare:
            got = repr(arguments[0]) if arguments else "no argument"
            raise ConfigError(
                f"got {got}, expected CONFIG [key=value ...] where CONFIG is "
                f"{', '.join(names)} or a FILE.yaml; see --help"
            )
        path = shipped_config(package, bare.pop(0))
        values, source = read_yaml(path), str(path)
    prefix = f"{section}." if section else ""
    for key, value in [*_read_positional(bare, part, positional), *given]:
        set_value(values, prefix + key, value)
    config: Any = build_config(cls, values, source=source)
    return getattr(config, section) if section else config


class Field(NamedTuple):
    """A field of a configuration, or of a section of it."""

    path: str
    field: dataclasses.Field
    annotation: Any
    text: str
    """Its docstring."""

    @property
    def section(self) -> type | None:
        """The dataclass that it holds, if any."""
        kinds = (self.annotation, *typing.get_args(self.annotation))
        sections: list[Any] = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        return sections[0] if sections else None


def _fields(cls: type, prefix: str = "") -> Iterator[Field]:
    """All fields of a dataclass; a section is followed by its own fields."""
    documents = field_docstrings(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        text = " ".join(documents.get(field.name, "").split())
        found = Field(prefix + field.name, field, hints[field.name], text)
        yield found
        if found.section:
            yield from _fields(found.section, f"{found.path}.")


def _read(arguments: Sequence[str], cls: type) -> tuple[list[str], list[tuple[str, Any]]]:
    """Bare arguments, and the paths and values that the others set."""
    fields = {field.path: field for field in _fields(cls)}
    bare: list[str] = []
    given: list[tuple[str, Any]] = []
    lists: dict[str, list[Argument]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if "=" in argument:
                given.append(split_override(argument))
            else:
                bare.append(argument)
            continue
        name, has_value, text = argument[2:].partition("=")
        path = _find_path(name, fields)
        if not has_value and _holds(fields[path], bool):
            text = rest.pop(0) if rest[:1] in (["true"], ["false"]) else "true"
        elif not has_value:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name}: expected a value")
            text = rest.pop(0)
        value: Any = Argument(text)
        if _holds(fields[path], list, tuple) and not text.startswith("["):
            value = lists.setdefault(path, [])
            value.append(Argument(text))
        given.append((path, value))
    return bare, given


def _find_path(name: str, fields: dict[str, Field]) -> str:
    """The path of the field that the flag `--name` means."""
    wanted = name.replace("-", "_")
    if wanted in fields:
        return wanted
    found = [path for path in fields if path.endswith(f".{wanted}")]
    if len(found) > 1:
        raise ConfigError(f"--{name} is one of {', '.join(found)}: say which")
    if not found:
        top = [path for path in fields if "." not in path]
        raise ConfigError(f"--{name}: unknown key. {did_you_mean(wanted, top)}")
    return found[0]


def _holds(field: Field, *kinds: type) -> bool:
    """Whether the value of a field is of one of these kinds, or None."""
    members = union_members(field.annotation) - {types.NoneType}
    return {typing.get_origin(member) or member for member in members} <= set(kinds)


def _read_positional(
    bare: Sequence[str], cls: type, names: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """The fields that bare arguments fill."""
    fields = {field.path: field for field in _fields(cls)}
    rest = list(bare)
    for name in names:
        if rest and _holds(fields[name], list, tuple):
            yield name, [Argument(text) for text in rest]
            return
        if rest:
            yield name, Argument(rest.pop(0))
    if rest:
        raise ConfigError(f"got {rest[0]!r}, expected key.path=value or --key value; see --help")


def _configurations(cls: type, package: str) -> list[str]:
    """Names of the shipped configurations that have the fields of `cls`."""
    fields = {field.name for field in dataclasses.fields(cls)}
    names = shipped_names(package)
    return [name for name in names if fields.issuperset(read_yaml(shipped_config(package, name)))]


# ---- help


def usage(
    cls: type, *, configs: Sequence[str] = (), positional: Sequence[str] = (), program: str = ""
) -> str:
    """What `--help` prints: the docstring of `cls` and a line for each field, also of sections."""
    main = sys.modules["__main__"].__spec__
    module = main.name if main and main.name.startswith("vqrae.") else cls.__module__
    words = [*(["CONFIG"] if configs else []), *(name.upper() for name in positional)]
    parts = ["usage:", program or f"python -m {module}", *words, "[key=value | --key value ...]"]
    lines = [" ".join(parts), "", textwrap.dedent(cls.__doc__ or "").strip()]
    if configs:
        lines.append(f"CONFIG: {', '.join(configs)}, or a FILE.yaml; key=value changes it.")
    rows = list(_rows(cls))
    width = max(len(key) for key, _ in rows) + 2
    return "\n".join([*lines, "", *(f"  {key:<{width}}{text}" for key, text in rows)])


def _rows(cls: type) -> Iterator[tuple[str, str]]:
    """(key, meaning with type and default) of each field; keys of a section once for its type."""
    shown: dict[type, str] = {}
    hidden: list[str] = []
    for field in _fields(cls):
        if field.path.startswith(tuple(hidden)):
            continue
        text = field.text
        if field.section in shown:
            text += f" Keys as those of {shown[field.section]}."
            hidden.append(f"{field.path}.")
        elif field.section:
            shown[field.section] = field.path
        yield field.path, f"{text} ({_default(field.field, field.annotation)})".strip()


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
    """A type for people: `int | None`, `a | b` for a Literal, `section` for a dataclass."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(_kind, arguments))
    if dataclasses.is_dataclass(annotation):
        return "section"
    if annotation is types.NoneType:
        return "null"
    if arguments[1:] == (...,):
        return f"list of {_kind(arguments[0])}"
    name = getattr(annotation, "__name__", str(annotation))
    return str(annotation).replace("typing.", "") if arguments else name


# ---- progress


def progress_line(label: str) -> Callable[[int, int], None]:
    """A function of (done, total) that shows progress and the remaining time.

    On a terminal the line is rewritten in place, elsewhere it is printed at every tenth.
    """
    begin = time.monotonic()
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        terminal = sys.stderr.isatty()
        tenth = 10 * done // max(total, 1)
        if not terminal and tenth == shown:
            return
        shown = tenth
        left = format_duration((time.monotonic() - begin) / max(done, 1) * (total - done))
        line = f"{label} {done}/{total}  {left} left"
        end = "" if terminal and done < total else "\n"
        # Back to the start of the line, and clear what was longer.
        print(f"\r\033[K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)

    return show
