"""What a user reads when something goes wrong, and the exit code of every entry point."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vqrae.common.config import ConfigError
from vqrae.common.errors import exit_code, require_package
from vqrae.data.samples import TooManyBrokenSamples
from vqrae.quickstart import train_llm

ROOT = Path(__file__).parents[2]


def fails_with(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("temperature: got -1"), 2, "temperature: got -1 (VQRAE_DEBUG=1 shows where)"),
        (ConfigError("a.yaml:\n  x: y\n  z: \x1b"), 2, "a.yaml:\n  x: y\n  z: \\x1b"),
        (TooManyBrokenSamples("tars: 5 of 6 are broken"), 2, "tars: 5 of 6 are broken"),
        (FloatingPointError("the loss is nan"), 1, "the loss is nan (VQRAE_DEBUG=1 shows where)"),
        (
            torch.OutOfMemoryError("CUDA out of\nmemory"),
            2,
            "out of memory, choose a smaller batch: CUDA out of memory",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            "out of memory, choose a smaller batch",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_told(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(fails_with(error), "vqrae") == code
    assert capsys.readouterr().err.startswith(f"vqrae: {message}")


@pytest.mark.parametrize(
    "error", [TypeError("a"), KeyError("a"), RuntimeError("mat1"), ImportError("a", name="vqrae.x")]
)
def test_errors_of_the_program_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        exit_code(fails_with(error), "vqrae")


def test_every_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQRAE_DEBUG", "1")
    with pytest.raises(ConfigError):
        exit_code(fails_with(ConfigError("x")), "vqrae")


def test_processes_of_one_launch_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    exit_code(fails_with(ConfigError("x")), "vqrae")
    assert capsys.readouterr().err == "vqrae (process 1): x\n"


def test_a_missing_package_is_named_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    error = ModuleNotFoundError("No module named 'peft'", name="peft.utils")
    assert exit_code(fails_with(error), "vqrae") == 2
    command = re.escape(f"{sys.executable} -m pip install 'peft>=")
    assert re.fullmatch(
        rf"vqrae: the package peft is not installed: {command}[\d.]+'\n", capsys.readouterr().err
    )
    message = r"lora needs the package no_such, which is not installed: .*pip install 'no_such'"
    with pytest.raises(ValueError, match=message):
        require_package("no_such", "lora")
    require_package("yaml", "this")


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise ValueError("a.png is broken")


def test_what_a_loader_raises_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: print(list(DataLoader(Broken(), num_workers=1))), "vqrae") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "vqrae: a.png is broken (VQRAE_DEBUG=1 shows where)"


def test_terminate_ends_what_was_begun(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\nfrom vqrae.common.errors import exit_code\n"
        "def run():\n    try:\n        print('begun', flush=True); time.sleep(60)\n"
        "    finally:\n        pathlib.Path(sys.argv[1]).write_text('kept')\n"
        "sys.exit(exit_code(run, 'vqrae'))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "state")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == "vqrae: terminated\n"
    assert process.returncode == 143
    assert (tmp_path / "state").read_text() == "kept"


def test_every_entry_point_reports_alike() -> None:
    guard = 'if __name__ == "__main__":\n'
    packages = [path.parent for path in ROOT.glob("*/py.typed")]
    modules = [path for package in packages for path in package.rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in modules}
    entries = {path: text.partition(guard)[2].strip() for path, text in texts.items()}
    entries = {path: call for path, call in entries.items() if call}
    assert len(entries) > 15
    others = {path for path, call in entries.items() if call != "run_main(main)"}
    # The second runs before anything is installed.
    assert others == {"scripts/cli.py", "scripts/missing.py"}


def test_a_mistake_in_a_training_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: train_llm.main(["tiny_llm", "no_such_key=1"]), "vqrae") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("vqrae: ")
    assert "no_such_key: unknown key" in line
