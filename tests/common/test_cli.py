"""Arguments of the form key=value, their help and their errors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vqrae.common.cli import field_docstrings, parse_arguments, progress_line, read_run, usage
from vqrae.common.config import ConfigError, shipped_config
from vqrae.generation.config import GenerationConfig
from vqrae.understanding.train import TrainConfig


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
def test_mistakes_end_with_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
        config = read_run(TrainConfig, "vqrae.understanding", [name, "sft.max_steps=7"])
        assert config.sft.max_steps == 7
    shards = read_run(
        GenerationConfig, "vqrae.generation", ["tiny", "size=3"], section="extraction"
    )
    assert shards.size == 3
    for arguments in ([], ["seed=1"], ["--steps"]):
        with pytest.raises(
            ConfigError,
            match=r"expected CONFIG .* where CONFIG is .*tiny.* or a FILE\.yaml; see --help",
        ):
            read_run(TrainConfig, "vqrae.understanding", arguments)
    with pytest.raises(SystemExit) as stop:
        read_run(TrainConfig, "vqrae.understanding", ["tiny", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert (
        "CONFIG: qwen2_5_7b, smollm2, tiny, vicuna_13b, vicuna_7b, or a FILE.yaml" in text
    )  # tiny_llm is another's
    assert "pretrain.learning_rate" in text
    assert "Keys as those of pretrain. (section; required)" in text
    assert "lora.rank" in text


def test_field_docstrings() -> None:
    assert field_docstrings(Command) == {
        "model": "What it is\n    done with.",
        "count": "How often.",
        "inner": "Nested.",
    }


def test_progress_prints_every_tenth_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_line("work")
    for done in range(1, 101):
        show(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "work 100/100  0s left"
