"""At most one comprehension in a statement, none nested, and files of at most 400 lines."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["common", "data", "tokenizer", "understanding", "generation", "mllm", "eval"]
FOLDERS += ["planning", "quickstart", "demo", "scripts", "benchmarks"]
FOLDERS += ["serving"]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Assert, ast.Raise)
# Longer for a reason: the loop that is read from top to bottom.
LONG = {"tokenizer/train.py": 500}


def dense(code: str) -> Iterator[int]:
    """Lines of statements with two comprehensions, or one that is nested."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, SIMPLE):
            inside = [each for each in ast.walk(node) if isinstance(each, COMPREHENSIONS)]
            if len(inside) > 1 or any(len(each.generators) > 1 for each in inside):
                yield node.lineno


def test_the_check_sees_what_it_forbids() -> None:
    lines = [
        "a = [x for x in y]",
        "b = [x for y in z for x in y]",
        "c = [[x for x in y] for y in z]",
    ]
    lines += ["d = [x for x in y] + [x for x in z]"]
    assert list(dense("\n".join(lines))) == [2, 3, 4]


@pytest.mark.parametrize("folder", FOLDERS)
def test_one_comprehension_in_a_statement(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        found += [f"{name}:{line}" for line in dense(path.read_text())]
    assert found == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_files_fit_on_a_few_screens(folder: str) -> None:
    files = (ROOT / folder).rglob("*.py")
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    most = 430 if folder == "tests" else 400
    long = {name: lines for name, lines in lengths.items() if lines > LONG.get(name, most)}
    assert long == {}
