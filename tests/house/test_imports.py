"""Imports point one way, name what they use where it is defined, and are declared in setup.py.

common <- data <- tokenizer <- {understanding, generation} <- mllm <- eval <- planning
<- quickstart <- demo <- scripts
"""

import ast
import importlib.metadata
import itertools
import runpy
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ROOMS = ["common", "data", "tokenizer", "understanding", "generation"]
ROOMS += ["mllm", "eval", "planning", "quickstart", "demo", "scripts"]
MAY_IMPORT = {room: set(ROOMS[: place + 1]) for place, room in enumerate(ROOMS)}
MAY_IMPORT["generation"] -= {"understanding"}
# Not installed: run from the repository, where they are imported by their own names.
OUTSIDE = {"benchmarks": {"benchmarks"}, "tests": {"benchmarks"}}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(code: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module; a relative one starts with a dot."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base == "vqrae" else base


def problems(code: str, allowed: set[str], bare: Collection[str] = ()) -> Iterator[str]:
    """What is wrong with imports, if the rooms `allowed` and the folders `bare` are not."""
    for line, name in imports(code):
        top, _, rest = name.partition(".")
        if not top:
            yield f"line {line} imports {name}: relative"
        elif top in {*ROOMS, *OUTSIDE}.difference(bare):
            yield f"line {line} imports {name}: bare folder name"
        elif top == "vqrae" and rest.partition(".")[0] not in allowed:
            yield f"line {line} imports {name}: against the layering"


@pytest.mark.parametrize("folder", [*MAY_IMPORT, *OUTSIDE])
def test_imports_respect_the_layers(folder: str) -> None:
    found = []
    for path in sources(folder):
        allowed, bare = MAY_IMPORT.get(folder, set(ROOMS)), OUTSIDE.get(folder, set())
        name = path.relative_to(ROOT)
        found += [f"{name} {problem}" for problem in problems(path.read_text(), allowed, bare)]
    assert found == []


def test_the_check_sees_what_it_forbids() -> None:
    lines = ["import tokenizer", "from . import x", "from vqrae.eval import y"]
    lines += ["from vqrae import data", "import vqrae.common.run", "import benchmarks"]
    found = problems("\n".join(lines), {"common"})
    assert [problem.rpartition(": ")[2] for problem in found] == [
        "bare folder name",
        "relative",
        "against the layering",
        "against the layering",
        "bare folder name",
    ]


def test_packages_re_export_nothing() -> None:
    """A name is imported from where it is defined: an `__init__.py` is a docstring at most."""
    found = []
    for path in itertools.chain.from_iterable(map(sources, [*ROOMS, "benchmarks"])):
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            is_docstring = [isinstance(node, ast.Expr) for node in body]
            found += [str(path.relative_to(ROOT))] if is_docstring not in ([], [True]) else []
    assert found == []


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
    files = itertools.chain.from_iterable(map(sources, ROOMS))
    folders = {path.parent.relative_to(ROOT) for path in files}
    assert set(setup["packages"]) == {"vqrae." + ".".join(folder.parts) for folder in folders}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    assert all((ROOT / room / "py.typed").is_file() for room in ROOMS)


def test_every_data_file_is_installed(setup: dict[str, Any]) -> None:
    run_from_the_repository = {".sh", ".txt", ".py", ".pyc"}
    left_out = []
    for path in itertools.chain.from_iterable((ROOT / room).rglob("*") for room in ROOMS):
        if not path.is_file() or path.suffix in run_from_the_repository:
            continue
        package = path.parent
        while not (package / "__init__.py").exists():
            package = package.parent
        patterns = setup["package_data"]["vqrae." + ".".join(package.relative_to(ROOT).parts)]
        if not any(path in package.glob(pattern) for pattern in patterns):
            left_out.append(str(path.relative_to(ROOT)))
    assert left_out == []


def test_every_import_is_declared(setup: dict[str, Any]) -> None:
    extras = itertools.chain.from_iterable(setup["extras_require"].values())
    declared = [*setup["install_requires"], *extras]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    names |= {"huggingface-hub", "tokenizers"}  # of transformers, which re-exports parts of them
    providers = importlib.metadata.packages_distributions()
    missing = set()
    for path in itertools.chain.from_iterable(map(sources, [*ROOMS, "benchmarks"])):
        for _, name in imports(path.read_text()):
            top = name.partition(".")[0]
            known = {canonicalize_name(provider) for provider in providers.get(top, [top])}
            is_ours = top in ("vqrae", "benchmarks") or top in sys.stdlib_module_names
            if not is_ours and not known & names:
                missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert missing == set()


def test_tested_versions_satisfy_the_declared_ranges(setup: dict[str, Any]) -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert list(pins) == sorted(pins, key=str.lower)
    extras = setup["extras_require"]
    for line in [*setup["install_requires"], *extras["dev"], *extras["deepspeed"]]:
        requirement = Requirement(line)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), line


def test_entry_points_exist(setup: dict[str, Any]) -> None:
    entries = list(itertools.chain.from_iterable(setup["entry_points"].values()))
    assert entries
    for entry in entries:
        module, _, name = entry.partition("=")[2].strip().partition(":")
        assert hasattr(importlib.import_module(module), name), entry
