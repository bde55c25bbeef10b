"""YAML files and command-line values, converted to typed dataclasses.

A run is a YAML file. Every key must be a field of the dataclass that reads it, and every value is
converted to the declared type of its field or refused. All problems of a file are reported
together, before anything is built.
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


# ---- YAML


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (`1e-4` is a number, `on` a word) and no duplicate keys."""


_StrictLoader.yaml_implicit_resolvers = {}
# PyYAML follows YAML 1.1, where `1e-4` is text and `on` is true; these two are replaced below.
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _kept = [each for each in _resolvers if not each[0].endswith((":float", ":bool"))]
    _StrictLoader.yaml_implicit_resolvers[_first] = _kept
_BOOL = re.compile(r"^(true|false)$", re.IGNORECASE)
_FLOAT = re.compile(
    r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"
)
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    values: dict = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node)
        if key in values:
            place = f"{node.start_mark.name}, line {node.start_mark.line + 1}"
            raise ConfigError(f"{place}: key {key!r} is given twice")
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def parse_yaml(text: str, *, source: str = "YAML") -> Any:
    """Parse YAML text with the strict loader; ConfigError names `source`."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path.absolute()} does not exist")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), source=str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}): save it in that encoding") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected a mapping")
    values = values or {}
    values.pop("prepare", None)  # what the launcher makes first; a job sees only the paths
    return values


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML text."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)


# ---- checks


def check_range(config: Any, *names: str, low: float, high: float = sys.float_info.max) -> None:
    """Refuse numbers of a dataclass outside of [low, high] with ValueError; None passes.

    Infinity passes only with `high=math.inf`.
    """
    top = "" if high >= sys.float_info.max else f" and at most {high:g}"
    problems = []
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            problems.append(f"{name}: got {value}, expected at least {low:g}{top}")
    if problems:
        raise ValueError("; ".join(problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest of the `known` names and lists them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Available: {', '.join(known)}."


# ---- conversion


@dataclasses.dataclass(frozen=True)
class Argument:
    """Text from the command line. It is read when the type of its field is known."""

    text: str

    def read(self, annotation: Any, where: str) -> Any:
        """Text as it is for a field of type `str`, else the value that it is as YAML.

        One name is a list of it, as `--key name` is.
        """
        kinds = union_members(annotation)
        if kinds - {types.NoneType} != {str}:
            value = parse_yaml(self.text, source=f"{where}={self.text}")
            is_list = all(get_origin(kind) in (list, tuple) for kind in kinds - {types.NoneType})
            return [value] if is_list and isinstance(value, str) else value
        return None if self.text == "null" and types.NoneType in kinds else self.text


def union_members(annotation: Any) -> set[Any]:
    """The types that a value may have: those of a union, or the one."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return set(get_args(annotation)) if is_union else {annotation}


class _Converter:
    """Converts values to declared types, and notes in `problems` what cannot be converted."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def refuse(self, value: Any, where: str, expected: str) -> Any:
        self.problems.append(f"{where}: got {value!r}, expected {expected}")
        return value

    def convert(self, value: Any, annotation: Any, where: str) -> Any:
        """`value` as `annotation` declares it, or unchanged after a problem was noted."""
        if isinstance(value, Argument):
            value = value.read(annotation, where)
        kinds = get_args(annotation)
        origin = get_origin(annotation) or annotation
        if dataclasses.is_dataclass(annotation):
            return self.build(typing.cast(type, annotation), value, where)
        if origin in (Union, types.UnionType):
            return self.union(value, kinds, where)
        if origin is Literal:
            choices = ", ".join(map(repr, kinds))
            return value if value in kinds else self.refuse(value, where, f"one of {choices}")
        if origin in (list, tuple):
            return self.sequence(value, origin, kinds, where)
        if origin in (dict, Any):
            return self.free(value, origin, where)
        return self.scalar(value, origin, where)

    def union(self, value: Any, kinds: tuple, where: str) -> Any:
        if value is None and types.NoneType in kinds:
            return None
        trial = _Converter()
        for kind in kinds:
            if kind is not types.NoneType:
                trial = _Converter()
                converted = trial.convert(value, kind, where)
                if not trial.problems:
                    return converted
        self.problems += trial.problems
        return value

    def sequence(self, value: Any, kind: Any, kinds: tuple, where: str) -> Any:
        length = len(kinds) if kind is tuple and Ellipsis not in kinds else None
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            return self.refuse(value, where, f"a list of {length}" if length else "a list")
        items = enumerate(value)
        return kind(self.convert(item, kinds[0], f"{where}[{i}]") for i, item in items)

    def free(self, value: Any, kind: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {key: self.convert(item, Any, f"{where}.{key}") for key, item in value.items()}
        return value if kind is Any else self.refuse(value, where, "a mapping")

    def scalar(self, value: Any, kind: type, where: str) -> Any:
        accepted: Any = (int, float) if kind is float else kind
        is_bool_for_number = isinstance(value, bool) and kind in (int, float)
        if not isinstance(value, accepted) or is_bool_for_number:
            got = f"{value!r} ({type(value).__name__})"
            self.problems.append(f"{where}: got {got}, expected {kind.__name__}")
            return value
        if kind is float and math.isnan(value):
            return self.refuse(value, where, "a number")
        return float(value) if kind is float else value

    def build(self, cls: type, values: Any, where: str) -> Any:
        """The dataclass `cls` from a mapping; None where there are problems."""
        if not isinstance(values, dict):
            return self.refuse(values, where or cls.__name__, "a mapping")
        prefix = f"{where}." if where else ""
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        converted = {}
        for key, value in values.items():
            if key in fields:
                converted[key] = self.convert(value, hints[key], f"{prefix}{key}")
            else:
                hint = did_you_mean(str(key), fields)
                self.problems.append(f"{prefix}{key}: unknown key. {hint}")
        for name, field in fields.items():
            required = field.default is field.default_factory is dataclasses.MISSING
            if required and name not in values:
                self.problems.append(f"{prefix}{name}: required, but not given")
        if not self.problems:
            try:
                return cls(**converted)
            except ValueError as error:
                self.problems.append(f"{where or cls.__name__}: {error}")
        return None


def build_config(cls: type[T], values: dict, *, source: str = "config") -> T:
    """Build dataclass `cls` from a mapping.

    Raises ConfigError, naming every unknown key, missing key and value of the wrong type.
    """
    converter = _Converter()
    config = converter.build(cls, values, "")
    if converter.problems:
        separator = " " if len(converter.problems) == 1 else "\n  "
        raise ConfigError(separator.join([f"{source} cannot be used:", *converter.problems]))
    return config


def set_value(values: dict, path: str, value: Any) -> None:
    """Set the value at `key.path` of nested mappings, which are made where they are missing."""
    *parents, leaf = path.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {parent!r} is a value, it has no keys")
    values[leaf] = value


def split_override(argument: str) -> tuple[str, Argument | None]:
    """`key.path=value` -> the path and the value; an empty value is None."""
    path, separator, text = argument.partition("=")
    if not separator or not path:
        raise ConfigError(f"got {argument!r}, expected key.path=value")
    return path, Argument(text) if text else None


def load_config(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Read the YAML file `path` into dataclass `cls`, with `key.path=value` overrides applied."""
    values = read_yaml(path)
    for override in overrides:
        set_value(values, *split_override(override))
    return build_config(cls, values, source=str(path))


# ---- shipped configurations


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
    # Unlike `importlib.resources`, this does not import the package, which takes seconds.
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "configs"
