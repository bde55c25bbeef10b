import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from vqrae.common.config import (
    ConfigError,
    build_config,
    check_range,
    load_config,
    parse_yaml,
    shipped_config,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be positive")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    mode: Literal["a", "b", 1] = "a"
    betas: tuple[float, ...] = (0.9, 0.999)
    name: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def test_numbers_and_words_are_what_they_look_like() -> None:
    values = parse_yaml("{a: 1e-4, b: 1.5, c: 3, d: on, e: true, f: null, g: 2.e3, h: 1e4x}")
    expected = {"a": 1e-4, "b": 1.5, "c": 3, "d": "on", "e": True, "f": None}
    assert values == {**expected, "g": 2000.0, "h": "1e4x"}


def test_values_are_converted_to_the_declared_type() -> None:
    config = build_config(Outer, {"inner": {"rate": 1}, "betas": [0.5, 1], "mode": 1})
    assert config.inner.rate == 1.0
    assert isinstance(config.inner.rate, float)
    assert config.betas == (0.5, 1.0)
    assert config.mode == 1
    assert config.name is None


def test_all_problems_are_reported_at_once() -> None:
    inner = {"rat": 1, "steps": "x"}
    with pytest.raises(ConfigError) as caught:
        build_config(Outer, {"inner": inner, "mode": "c", "naem": "y", "betas": 3})
    message = str(caught.value)
    for part in (
        "inner.rat: unknown key. Did you mean 'rate'?",
        "inner.rate: required",
        "inner.steps: got 'x' (str), expected int",
        "mode: got 'c', expected one of 'a', 'b', 1",
        "naem: unknown key. Did you mean 'name'?",
        "betas: got 3, expected a list",
    ):
        assert part in message


def test_checks_of_a_section_name_it() -> None:
    with pytest.raises(ConfigError, match="inner: steps must be positive"):
        build_config(Outer, {"inner": {"rate": 1.0, "steps": 0}})
    with pytest.raises(ConfigError, match=r"inner.steps: got True \(bool\), expected int"):
        build_config(Outer, {"inner": {"rate": 1.0, "steps": True}})


def test_overrides_follow_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inner: {rate: 1e-3}\n")
    config = load_config(Outer, path, ["inner.rate=2e-4", "name=x=y", "extra.a.b=[1, 2]"])
    assert config.inner.rate == 2e-4
    assert config.name == "x=y"
    assert config.extra == {"a": {"b": [1, 2]}}
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        load_config(Outer, path, ["--rate"])
    with pytest.raises(ConfigError, match=r"extra=\[1 is not valid YAML"):
        load_config(Outer, path, ["extra=[1"])
    with pytest.raises(ConfigError, match="it has no keys"):
        load_config(Outer, path, ["inner.rate.x=1"])


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inner: {rate: 1}\nname: a\nname: b\n")
    with pytest.raises(ConfigError, match="'name' is given twice"):
        load_config(Outer, path)


@dataclass(frozen=True, kw_only=True)
class Ranged:
    rate: float = 0.1
    size: int | None = 1
    steps: int = 1
    norm: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "rate", low=0, high=1)
        check_range(self, "size", "steps", low=1)
        check_range(self, "norm", low=0, high=math.inf)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": -0.1}, "rate: got -0.1, expected at least 0 and at most 1"),
        ({"size": 0}, "size: got 0, expected at least 1"),
        (
            {"steps": 0, "size": -1},
            "size: got -1, expected at least 1; steps: got 0, expected at least 1",
        ),
        ({"rate": math.nan}, "rate: got nan, expected a number"),
        ({"rate": math.inf}, "rate: got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(Ranged, values)
    assert build_config(Ranged, {"size": None, "norm": math.inf}).norm == math.inf


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: Grün\n".encode("utf-16"), "is not UTF-8 text"),
        ("name: Grün\n".encode("latin-1"), "is not UTF-8 text"),
        (b"inner: [1,\n", "is not valid YAML"),
        (b"- a\n- b\n", "holds list, expected a mapping"),
        (b"inner: {rate: .nan}\n", "inner.rate: got nan, expected a number"),
    ],
)
def test_files_that_cannot_be_read_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(Outer, path, ["name=x"])
    assert str(path) in str(raised.value)


def test_shipped_names_are_suggested() -> None:
    assert shipped_config("vqrae.tokenizer", "tiny").is_file()
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        shipped_config("vqrae.tokenizer", "tinny")
