"""YAML files and `key.path=value` overrides, parsed into typed dataclasses.

A run is a YAML file. Every key must be a field of the dataclass that reads it, every value is converted to the field's
declared type or refused, and all problems of a file are reported together, before anything is built.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem found."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (`1e-4` is a number, `on` is a word) that refuses duplicate keys."""


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(
                f"{node.start_mark.name}, line {node.start_mark.line + 1}: key {key!r} is given twice"
            )
    return {
        key: loader.construct_object(value, deep=True)
        for key, (_, value) in zip(keys, node.value, strict=True)
    }


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def parse_yaml(text: str, *, source: str = "YAML") -> Any:
    """Parse YAML text with the strict loader.

    Raises:
        ConfigError: naming `source`, for text that is no YAML.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def check_range(config: Any, *names: str, low: float, high: float = sys.float_info.max) -> None:
    """Refuse numbers of a dataclass outside of [low, high]; None passes, infinity only with `high=math.inf`.

    Raises:
        ValueError: naming every field that is out of its range.
    """
    top = "" if high >= sys.float_info.max else f" and at most {high:g}"
    values = {name: getattr(config, name) for name in names}
    problems = [
        f"{name}: got {value}, expected at least {low:g}{top}"
        for name, value in values.items()
        if value is not None and not low <= value <= high
    ]
    if problems:
        raise ValueError("; ".join(problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest of the `known` names and lists them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Available: {', '.join(known)}."


def _convert(value: Any, annotation: Any, where: str, problems: list[str]) -> Any:
    """Convert `value` to `annotation`, or note in `problems` why that is impossible."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        for choice in choices:
            trial: list[str] = []
            converted = _convert(value, choice, where, trial)
            if not trial:
                return converted
        problems.extend(trial)
        return value
    if origin is Literal:
        if value not in arguments:
            problems.append(
                f"{where}: got {value!r}, expected one of {', '.join(map(repr, arguments))}"
            )
        return value
    if dataclasses.is_dataclass(annotation):
        return _build(typing.cast(type, annotation), value, where, problems)
    if origin in (list, tuple):
        fixed = len(arguments) if origin is tuple and Ellipsis not in arguments else None
        if not isinstance(value, list | tuple) or (fixed and len(value) != fixed):
            problems.append(
                f"{where}: got {value!r}, expected a list{f' of {fixed}' if fixed else ''}"
            )
            return value
        return origin(
            _convert(item, arguments[0], f"{where}[{i}]", problems) for i, item in enumerate(value)
        )
    if origin is dict or annotation is dict:
        if not isinstance(value, dict):
            problems.append(f"{where}: got {value!r}, expected a mapping")
        return value
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            problems.append(f"{where}: got nan, expected a number")
        return float(value)
    if isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    problems.append(
        f"{where}: got {value!r} ({type(value).__name__}), expected {annotation.__name__}"
    )
    return value


def _build(cls: type, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{where or cls.__name__}: got {values!r}, expected a mapping")
        return None
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in fields]
    problems += [f"{prefix}{key}: unknown key. {did_you_mean(str(key), fields)}" for key in unknown]
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if name not in values and (field.default, field.default_factory) == required:
            problems.append(f"{prefix}{name}: required, but not given")
    known = {
        key: _convert(value, hints[key], f"{prefix}{key}", problems)
        for key, value in values.items()
        if key in fields
    }
    if problems:
        return None
    try:
        return cls(**known)
    except ValueError as error:
        problems.append(f"{where or cls.__name__}: {error}")
        return None


def build_config(cls: type[T], values: dict, *, source: str = "config") -> T:
    """Build dataclass `cls` from a mapping.

    Raises:
        ConfigError: naming every unknown key, missing key and value of the wrong type.
    """
    problems: list[str] = []
    config = _build(cls, values, "", problems)
    if problems:
        text = (
            f" {problems[0]}"
            if len(problems) == 1
            else "".join(f"\n  {problem}" for problem in problems)
        )
        raise ConfigError(f"{source} cannot be used:{text}")
    return config


def apply_overrides(values: dict, overrides: Iterable[str]) -> dict:
    """Return `values` with each `key.path=value` set; the value is read as YAML."""
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"got {override!r}, expected key.path=value")
        *parents, leaf = path.split(".")
        node = values
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"{override!r}: {parent!r} is a value, it has no keys")
        node[leaf] = parse_yaml(text, source=override) if text else None
    return values


def load_config(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Read the YAML file `path` into dataclass `cls`, with command-line `overrides` applied."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path.absolute()} does not exist")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), source=str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}): save it in that encoding") from None
    if not isinstance(values, dict | None):
        raise ConfigError(
            f"{path} holds {type(values).__name__}, expected a mapping of keys to values"
        )
    return build_config(cls, apply_overrides(values or {}, overrides), source=str(path))


def shipped_config(package: str, name: str) -> Path:
    """Path of `configs/NAME.yaml` in one of our packages, or of a YAML file of the user's own."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = shipped_names(package)
    if name not in known:
        raise ConfigError(f"{package} has no config {name!r}. {did_you_mean(name, known)}")
    return _configs_folder(package) / f"{name}.yaml"


def shipped_names(package: str) -> list[str]:
    """Names of the configurations of one of our packages."""
    return sorted(path.stem for path in _configs_folder(package).glob("*.yaml"))


def _configs_folder(package: str) -> Path:
    spec = importlib.util.find_spec(
        package
    )  # unlike `importlib.resources` it does not import the package, which takes seconds
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "configs"


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML text."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)
