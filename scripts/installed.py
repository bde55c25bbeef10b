"""Import all of an installed vqrae, and all that it imports of one extra.

    python -m vqrae.scripts.installed [EXTRA]

Run outside the repository, by check_install.py, in an environment that has this extra alone.
"""

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from vqrae.common.config import read_yaml, shipped_config
from vqrae.common.errors import run_main
from vqrae.scripts.launch import JOBS

ROOMS = ["common", "data", "tokenizer", "understanding", "generation", "mllm", "eval"]
ROOMS += ["planning", "quickstart", "demo", "scripts"]


def requirements(extra: str | None) -> set[str]:
    """Names of the distributions that an extra asks for; None: those of all extras."""
    found = set()
    for line in importlib.metadata.requires("vqrae") or []:
        name, marker = re.split(r"[^\w.-]", line, maxsplit=1)[0], line.partition(";")[2]
        asked = re.search(r"extra == .([\w-]+)", marker)
        if asked and extra in (None, asked[1]):
            found.add(canonical(name))
    return found


def canonical(name: str) -> str:
    """The one spelling of a distribution's name: packages may write `lmms_eval` for `lmms-eval`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def modules() -> Iterator[str]:
    """The names of all modules of vqrae."""
    for room in ROOMS:
        package = importlib.import_module(f"vqrae.{room}")
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield module.name


def import_all(extra: str) -> tuple[int, list[str]]:
    """Import every module; returns how many, and those that wait for another extra.

    Raises:
        ImportError: for a package that no other extra brings.
    """
    others = {name.replace("-", "_") for name in requirements(None) - requirements(extra)}
    count, waiting = 0, []
    for name in modules():
        try:
            importlib.import_module(name)
            count += 1
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in others:
                raise
            waiting.append(name)
    return count, waiting


def import_lazy(extra: str) -> list[str]:
    """Carry out every import of the extra's packages, wherever it is; returns the files."""
    wanted, tops = requirements(extra), set()
    for top, providers in importlib.metadata.packages_distributions().items():
        if wanted & set(map(canonical, providers)) and not top.startswith(("_", "test")):
            tops.add(top)
            importlib.import_module(top)
    files = {}
    for room in ROOMS:
        folder = Path(importlib.import_module(f"vqrae.{room}").__path__[0])
        for path in sorted(folder.rglob("*.py")):
            for statement in imports_of(tops, path):
                exec(compile(statement, str(path), "exec"), {})
                files[f"{room}/{path.relative_to(folder)}"] = True
    return list(files)


def imports_of(tops: Collection[str], path: Path) -> Iterator[ast.Module]:
    """The imports in a file, also inside functions, of packages with these names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = ""
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
        elif isinstance(node, ast.Import):
            name = node.names[0].name
        if name.partition(".")[0] in tops:
            assert isinstance(node, ast.stmt)
            yield ast.Module([node], [])


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    extra = words[0] if words else "base"
    count, waiting = import_all(extra)
    for entry in importlib.metadata.distribution("vqrae").entry_points:
        entry.load()
    for name, job in JOBS.items():
        if job.config:
            read_yaml(shipped_config(f"vqrae.{name.partition('.')[0]}", job.config))
    files = import_lazy(extra) if extra != "base" else []
    used = f"; the extra is used by {', '.join(files)}" if files else ""
    print(f"{count} modules, {len(waiting)} wait for another extra{used}")


if __name__ == "__main__":
    run_main(main)
