"""Install the wheel with every extra alone, in empty environments, and use what is installed.

    bash scripts/check_install.sh [extras=NAME,NAME] [python=EXECUTABLE,EXECUTABLE]

For each Python and extra: an environment in a temporary folder, the wheel and that extra, then
`installed.py` in it (every module, every import of the extra, entry points, configurations);
without an extra also the `vqrae` command and two steps of a training. Prints a table of sizes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vqrae.common.cli import parse
from vqrae.common.config import ConfigError, did_you_mean
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, write_json

ROOT = Path(__file__).resolve().parents[1]
# What `install_requires` alone gives, and the extras that install without a compiler for GPUs.
MORE = ("deepspeed", "lora", "s3", "smollm2", "eval", "mplug", "demo", "tracking")
EXTRAS = ("base", *MORE, "photographs")
HEADER = ("python", "extra", "gigabytes", "seconds", "result")
NOT_SOURCES = (".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
TRAINING = "vqrae.scripts.launch quickstart.pretrain_encoder optimization.max_steps=2 output=run"


@dataclass(frozen=True, kw_only=True)
class CheckInstallConfig:
    """Install the wheel with each extra alone and import everything that the extra is for."""

    extras: str = "all"
    """Names joined by commas, or all; `base` means none."""
    python: str = sys.executable
    """Executables joined by commas."""
    constraints: bool = True
    """Install the tested versions, not the newest."""
    output: str = "runs/check_install"
    """Folder of `report.json`."""


def build_wheel(folder: Path, root: Path = ROOT) -> Path:
    """Build the wheel of the sources in `root`, from a copy: a build leaves files there.

    Raises:
        RuntimeError: when setuptools fails, with the end of what it says.
    """
    sources = folder / "sources"
    shutil.copytree(root, sources, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    call = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    run([sys.executable, "-c", call], sources)
    shutil.rmtree(sources)
    [wheel] = folder.glob("*.whl")
    return wheel


def run(command: list[str], folder: Path) -> str:
    """The output of a command that must succeed, in an environment without this one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    kept.pop("VIRTUAL_ENV", None)
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said}")
    return done.stdout


def check(extra: str, python: str, wheel: Path, *, constraints: bool) -> dict[str, str | float]:
    """One row of the table: what was installed, its size in GB, seconds, what was imported."""
    uv = shutil.which("uv")
    wanted = str(wheel) if extra == "base" else f"{wheel}[{extra}]"
    capped = ["-c", str(ROOT / "scripts" / "constraints.txt")] if constraints else []
    with tempfile.TemporaryDirectory(prefix="vqrae-install-") as temporary:
        folder = Path(temporary)
        begin = time.monotonic()
        if uv:
            run([uv, "venv", "--quiet", "--python", python, "env"], folder)
        else:
            run([python, "-m", "venv", "env"], folder)
        inside = str(folder / "env" / "bin" / "python")
        install = [uv, "pip", "install", "--python", inside] if uv else [inside, "-m", "pip"]
        run([*install, *([] if uv else ["install"]), *capped, wanted], folder)
        seconds = time.monotonic() - begin
        size = sum(file.lstat().st_size for file in (folder / "env").rglob("*"))
        version = run([inside, "-c", "import platform; print(platform.python_version())"], folder)
        imported = run([inside, "-m", "vqrae.scripts.installed", extra], folder)
        if extra == "base":
            run([str(folder / "env" / "bin" / "vqrae"), "plan", "tokenizer/tiny"], folder)
            run([inside, "-m", *TRAINING.split()], folder)
    values = (version.strip(), extra, round(size / 1e9, 1), round(seconds), imported.strip())
    return dict(zip(HEADER, values, strict=True))


def main(argv: list[str] | None = None) -> int:
    config = parse(CheckInstallConfig, argv)
    extras = list(EXTRAS) if config.extras == "all" else config.extras.split(",")
    for extra in extras:
        if extra not in EXTRAS:
            raise ConfigError(f"extras: there is no {extra!r}. {did_you_mean(extra, EXTRAS)}")
    rows: list[dict[str, str | float]] = []
    failed = 0
    with tempfile.TemporaryDirectory(prefix="vqrae-wheel-") as folder:
        wheel = build_wheel(Path(folder))
        for python in config.python.split(","):
            for extra in extras:
                try:
                    row = check(extra, python, wheel, constraints=config.constraints)
                except RuntimeError as error:
                    row = dict(zip(HEADER, (python, extra, "-", "-", str(error)), strict=True))
                    failed += 1
                rows.append(row)
                print(*row.values(), sep="  ", flush=True)
                write_json(Path(config.output) / "report.json", {"rows": rows})
    cells = [[*map(str, row.values())] for row in rows]
    print("\n".join(markdown_table(HEADER, cells)))
    return int(failed > 0)


if __name__ == "__main__":
    run_main(main)
