"""Arguments of the form key=value, their help and their errors."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from vqrae.common.cli import field_docstrings, parse_arguments, progress_line, usage


@dataclass(frozen=True, kw_only=True)
class Inner:
    scale: float = 2.0
    """Not shown by itself."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Do a thing."""

    model: str
    """What it is
    done with."""
    count: int = 3
    """How often."""
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    """Nested."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("count must be positive")


def test_values_are_typed_and_nested() -> None:
    config = parse_arguments(Command, ["model=x", "count=5", "inner.scale=3"])
    assert config == Command(model="x", count=5, inner=Inner(scale=3.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model: required"),
        (["model=x", "cuont=2"], "Did you mean 'count'?"),
        (["model=x", "count=many"], "expected int"),
        (["model=x", "count=0"], "count must be positive"),
        (["model"], "expected key.path=value"),
    ],
)
def test_mistakes_end_with_code_two(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Command, arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Command, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == usage(Command)
    assert "Do a thing." in text
    assert "model  What it is done with. (required)" in text
    assert "count  How often. (default: 3)" in text
    assert "kind   (a | b; default: a)" in text
    assert "inner  Nested. (default: inner.scale=2.0)" in text


def test_field_docstrings() -> None:
    assert field_docstrings(Command) == {"model": "What it is\n    done with.", "count": "How often.", "inner": "Nested."}


def test_progress_prints_every_tenth_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_line("work")
    for done in range(1, 101):
        show(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "work 100/100  0s left"
