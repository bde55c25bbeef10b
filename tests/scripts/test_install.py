"""The wheel holds what the repository holds; what imports all of it says what is missing."""

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from vqrae.scripts import check_install, installed
from vqrae.scripts.check_install import build_wheel

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".yaml", ".json", ".jinja", ".css", ".js"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for room in installed.ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.suffix in SUFFIXES or path.name == "py.typed":
                expected.add(f"vqrae/{path.relative_to(ROOT).as_posix()}")
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_wheel_has_entry_points_licence_and_extras(wheel: zipfile.ZipFile) -> None:
    [info] = {name.partition("/")[0] for name in wheel.namelist()} - {"vqrae"}
    points = configparser.ConfigParser()
    points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert points["console_scripts"]["vqrae"] == "vqrae.scripts.cli:main"
    assert "vqrae" in points["lmms_eval.models"]
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    metadata = wheel.read(f"{info}/METADATA").decode()
    extras = {
        line.partition(": ")[2]
        for line in metadata.splitlines()
        if line.startswith("Provides-Extra")
    }
    # `flash` needs a compiler for GPUs, `dev` is what the tests run in.
    assert extras - {"flash", "dev"} == {*check_install.EXTRAS} - {"base"}


def test_configurations_open_from_a_wheel_outside_the_repository(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.'); import vqrae.scripts.launch as launch;"
        "from vqrae.common.config import shipped_names;"
        "print(launch.__file__, shipped_names('vqrae.tokenizer'))"
    )
    # -S: the editable install of this environment is not seen, its packages are, such as PyYAML.
    command = [sys.executable, "-S", "-c", code]
    environment = {"PYTHONPATH": str(Path(yaml.__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in done.stdout
    assert "siglip2_256" in done.stdout


def test_a_missing_package_is_told_apart_from_another_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installed, "modules", lambda: ["json", "no_such_package"])
    monkeypatch.setattr(installed, "requirements", lambda extra: set() if extra else {"no-such"})
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        installed.import_all("base")
    extras = {None: {"no-such-package"}, "base": set()}
    monkeypatch.setattr(installed, "requirements", extras.__getitem__)
    assert installed.import_all("base") == (1, ["no_such_package"])


def test_imports_inside_functions_are_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from json import loads\n\nimport os.path\nimport sys\n")
    assert len(list(installed.imports_of({"json", "os"}, file))) == 2
