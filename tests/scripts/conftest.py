"""A copy of the repository's scripts, with a Python that only writes down how it was called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Variables of whoever runs the tests that would choose an environment.
FOREIGN = ("VIRTUAL_ENV", "CONDA_", "PYTHON", "UV_", "PIP_", "SLURM_", "MASTER_", "CUDA_")

SYSTEM = Path("/usr/bin")


class Repository:
    """A copy of the shell files, and an active environment whose `python` records its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "repo", folder / "calls"
        (self.folder / "scripts").mkdir(parents=True)
        for path in [*ROOT.glob("scripts/*.sh"), ROOT / "scripts/constraints.txt"]:
            shutil.copy(path, self.folder / "scripts")
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        self.make_python(folder / "env")
        self.make_python(self.folder / ".venv")
        self.tools = folder / "tools"
        self.tools.mkdir()
        clean = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        # The scripts prefer uv: a test that wants one makes it.
        folders = map(Path, os.get_exec_path())
        others = [str(path) for path in folders if not (path / "uv").exists() or path == SYSTEM]
        tools = {"CALLS": str(self.log), "PATH": os.pathsep.join([str(self.tools), *others])}
        self.environment = {**clean, "VIRTUAL_ENV": str(folder / "env"), **tools}

    def make_python(self, environment: Path) -> Path:
        """A Python that lacks $MISSING, needs $EXTRAS, and takes $INSTALL_SECONDS to install."""
        return self.make_tool(
            environment / "bin" / "python",
            'case "$*" in\n'
            '*missing.py*) [ -z "${MISSING:-}" ] || echo "$MISSING" ;;\n'
            '*" --extras "*) echo "${EXTRAS:-}" ;;\n'
            '*" install "*) sleep ${INSTALL_SECONDS:-0}; exit ${INSTALL_FAILS:-0} ;;\n'
            "esac\n",
        )

    @staticmethod
    def make_tool(path: Path, answers: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\necho "$*" >>"$CALLS"\n' + answers)
        path.chmod(0o755)
        return path

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        command = ["bash", str(self.folder / "scripts" / script), *arguments]
        return subprocess.run(
            command,
            cwd=self.folder.parent,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def calls(self, word: str = "-m vqrae.") -> list[list[str]]:
        """The recorded calls that contain `word`."""
        return [line.split() for line in self.log.read_text().splitlines() if word in line]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)
