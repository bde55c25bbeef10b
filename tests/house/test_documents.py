"""Documents and files in git: commands parse, links lead somewhere, no path of a machine."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launched import read

from vqrae.scripts import cli
from vqrae.scripts.launch import JOBS, plan_commands

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def commands(document: Path) -> list[list[str]]:
    """The words of every command in the shell blocks of a document."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("&&", "\n").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def unknown_keys(module: str, arguments: list[str]) -> str:
    """What a module says of keys that it does not know."""
    try:
        launched = plan_commands(module, arguments)[-1].arguments if module in JOBS else arguments
        read(module, launched)
    except ValueError as error:
        return str(error) if "unknown key" in str(error) else ""  # RUN and FILE do not exist
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(document):
        line = " ".join(words)
        if words[0] == "bash":
            modules = re.findall(r"launch ([\w.]+)", (ROOT / words[1]).read_text())
            problems = [unknown_keys(module, words[2:]) for module in modules]
            assert not problems or "" in problems, f"{line}: {problems}"
        elif words[:2] == ["python", "-m"] and words[2].startswith("vqrae."):
            assert unknown_keys(words[2].removeprefix("vqrae."), words[3:]) == "", line
        elif words[0] == "vqrae" and words[1:] != ["--help"]:
            assert cli.read(words[1:]), line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), target


def test_the_overview_names_files_that_exist() -> None:
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs/overview.svg").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/[\w/.]*)`", page)
    drawn = re.findall(r'class="file"[^>]*>([^<]+)<', picture)
    assert len(named) > 12
    assert len(drawn) == 8
    assert [name for name in named + drawn if not (ROOT / name).exists()] == []


def tracked_files() -> list[Path]:
    result = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    names = result.stdout.splitlines() or [
        str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.py")
    ]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_path_of_a_machine() -> None:
    homes = re.compile(r"(?<![\w.:])/(home|root|Users|work|farm|mnt)/\w")
    found = []
    for path in tracked_files():
        if path.suffix in {".py", ".sh", ".md", ".yaml", ".json", ".toml", ".txt", ""}:
            found += [
                f"{path.relative_to(ROOT)}: {match.group()}"
                for match in homes.finditer(path.read_text(encoding="utf-8"))
            ]
    assert found == []


def test_no_large_file_in_git() -> None:
    assert [str(path) for path in tracked_files() if path.stat().st_size > 2_000_000] == []
