"""Imports point one way, common <- data <- tokenizer <- {understanding, generation} <- eval <- {benchmarks, scripts}, and are
declared."""

import ast
import importlib.metadata
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ROOMS = (
    "common",
    "data",
    "tokenizer",
    "understanding",
    "generation",
    "eval",
    "planning",
    "quickstart",
)
MAY_IMPORT = {room: set(ROOMS[:place]) for place, room in enumerate(ROOMS)}
MAY_IMPORT["generation"] -= {"understanding"}
MAY_IMPORT["planning"] |= {"quickstart"}  # the plan of the tiny models
MAY_IMPORT |= {folder: set(ROOMS) for folder in ("benchmarks", "scripts")}
FOLDERS = set(MAY_IMPORT)
OUTSIDE = {"tests"}  # no package: it may import everything, nobody imports it


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(code: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module; a relative one starts with a dot."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (
                (node.lineno, f"{base}.{alias.name}" if base == "vqrae" else base)
                for alias in node.names
            )


def problems(code: str, allowed: set[str]) -> Iterator[str]:
    """What is wrong with the imports of a module that may import the folders `allowed`."""
    for line, name in imports(code):
        top, _, rest = name.partition(".")
        if not top:
            yield f"line {line} imports {name}: relative"
        elif top in FOLDERS | OUTSIDE:
            yield f"line {line} imports {name}: bare folder name"
        elif top == "vqrae" and rest.partition(".")[0] not in allowed:
            yield f"line {line} imports {name}: against the layering"


@pytest.mark.parametrize("folder", [*MAY_IMPORT, *sorted(OUTSIDE)])
def test_imports_respect_the_layers(folder: str) -> None:
    allowed = FOLDERS if folder in OUTSIDE else MAY_IMPORT[folder] | {folder}
    found = [
        f"{path.relative_to(ROOT)} {problem}"
        for path in sources(folder)
        for problem in problems(path.read_text(), allowed)
    ]
    assert found == []


def test_the_check_sees_what_it_forbids() -> None:
    code = "import tokenizer\nfrom . import x\nfrom vqrae.eval import y\nfrom vqrae import data\nimport vqrae.common.run\n"
    kinds = [problem.rpartition(": ")[2] for problem in problems(code, {"common"})]
    assert kinds == ["bare folder name", "relative", "against the layering", "against the layering"]


def test_scripts_holds_commands_only() -> None:
    assert {path.name for path in (ROOT / "scripts").glob("*.py")} <= {
        "__init__.py",
        "launch.py",
        "missing.py",
        "check_kill.py",
        "cli.py",
    }


# ---- packaging


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that setup.py gives to setuptools."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_every_folder_with_code_is_a_package(setup: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in sources(folder)}
    assert set(setup["packages"]) == {"vqrae." + ".".join(folder.parts) for folder in folders}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    assert all((ROOT / folder / "py.typed").is_file() for folder in FOLDERS)


def test_every_data_file_is_installed(setup: dict[str, Any]) -> None:
    launchers = {
        ".sh",
        ".txt",
        ".py",
        ".pyc",
    }  # of scripts/: run from the repository, not from the package
    files = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in launchers
    ]
    left_out = []
    for path in files:
        package = path.parent
        while not (package / "__init__.py").exists():
            package = package.parent
        patterns = setup["package_data"]["vqrae." + ".".join(package.relative_to(ROOT).parts)]
        if not any(path in package.glob(pattern) for pattern in patterns):
            left_out.append(str(path.relative_to(ROOT)))
    assert left_out == []


def test_every_import_is_declared(setup: dict[str, Any]) -> None:
    declared = [
        *setup["install_requires"],
        *(name for extra in setup["extras_require"].values() for name in extra),
    ]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    names |= {"huggingface-hub", "tokenizers"}  # of transformers, which re-exports parts of them
    providers = importlib.metadata.packages_distributions()
    missing = set()
    for path in (path for folder in FOLDERS for path in sources(folder)):
        for top in (
            {name.partition(".")[0] for _, name in imports(path.read_text())}
            - {"vqrae", ""}
            - sys.stdlib_module_names
        ):
            known = {canonicalize_name(provider) for provider in providers.get(top, [top])}
            if not known & names:
                missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert missing == set()


def test_tested_versions_satisfy_the_declared_ranges(setup: dict[str, Any]) -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert list(pins) == sorted(pins, key=str.lower)
    for line in [
        *setup["install_requires"],
        *setup["extras_require"]["dev"],
        *setup["extras_require"]["deepspeed"],
    ]:
        requirement = Requirement(line)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), line


def test_entry_points_exist(setup: dict[str, Any]) -> None:
    entries = [
        line.partition("=")[2].strip() for lines in setup["entry_points"].values() for line in lines
    ]
    assert entries
    for entry in entries:
        module, _, name = entry.partition(":")
        assert hasattr(importlib.import_module(module), name), entry
