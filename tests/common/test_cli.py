"""Arguments of the form key=value, their help and their errors."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vqrae.common.cli import parse, usage
from vqrae.common.config import ConfigError, shipped_config
from vqrae.generation.config import GeneratorConfig
from vqrae.understanding.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    scale: float = 2.0
    """Not shown by itself."""
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """Do a thing."""

    model: str
    """What it is
    done with."""
    count: int = 3
    """How often."""
    names: tuple[str, ...] = ()
    title: str | None = "none"
    no_color: bool = False
    dry_run: bool = True
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    """Nested."""
    other: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("count must be positive")


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=x", "count=5", "inner.scale=3", "names=[a, b]"],
        ["--model", "x", "--count=5", "--inner.scale", "3", "--names", "a", "--names", "b"],
        ["--inner.scale", "3", "model=x", "--count", "5", "--names=[a, b]"],
    ],
)
def test_keys_and_flags_are_the_same(arguments: list[str]) -> None:
    expected = Command(model="x", count=5, names=("a", "b"), inner=Inner(scale=3.0))
    assert parse(Command, arguments) == expected


def test_values_have_the_type_of_their_field() -> None:
    text = "what: 12? # yes, 'no"
    for arguments in (["--model", text], [f"model={text}"]):
        assert parse(Command, arguments).model == text
    assert parse(Command, ["model=12", "title=null"]) == Command(model="12", title=None)
    flags = ["model=x", "--no-color", "--dry-run", "false", "--title", ""]
    assert parse(Command, flags) == Command(model="x", no_color=True, dry_run=False, title="")


def test_bare_arguments() -> None:
    given = parse(Command, ["x", "a", "count=2", "b"], positional=["model", "names"])
    assert given == Command(model="x", count=2, names=("a", "b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model: required"),
        (["model=x", "cuont=2"], "Did you mean 'count'?"),
        (["model=x", "--cuont", "2"], "Did you mean 'count'?"),
        (["model=x", "count=many"], "expected int"),
        (["model=x", "count=0"], "count must be positive"),
        (["model"], "expected key.path=value"),
        (["--model", "--count", "2"], "--model: expected a value"),
        (["model=x", "--rate", "1"], "is one of inner.rate, other.rate: say which"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(Command, arguments)


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Command, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == usage(Command)
    assert "Do a thing." in text
    assert "model        What it is done with. (str; required)" in text
    assert "count        How often. (int; default: 3)" in text
    assert "kind         (a | b; default: a)" in text
    assert "inner        Nested. (section)" in text
    assert "inner.scale  Not shown by itself. (float; default: 2.0)" in text


def test_a_run_is_named_by_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(shipped_config("vqrae.understanding", "tiny").read_text())
    for name in ("tiny", str(own)):
        config = parse(TrainConfig, [name, "sft.max_steps=7"], package="vqrae.understanding")
        assert config.sft.max_steps == 7
    package = {"package": "vqrae.generation", "section": "extraction"}
    assert parse(GeneratorConfig, ["tiny", "size=3"], **package).size == 3
    message = r"expected CONFIG .* where CONFIG is .*tiny.* or a FILE\.yaml; see --help"
    for arguments in ([], ["seed=1"], ["--seed", "1"]):
        with pytest.raises(ConfigError, match=message):
            parse(TrainConfig, arguments, package="vqrae.understanding")
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, ["tiny", "--help"], package="vqrae.understanding")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    # tiny_llm is another's.
    assert "CONFIG: qwen2_5_7b, smollm2, tiny, vicuna_13b, vicuna_7b, or a FILE.yaml" in text
    assert "pretrain.learning_rate" in text
    assert "Keys as those of pretrain. (section; required)" in text
    assert "lora.rank" in text
