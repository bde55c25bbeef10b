"""The shell files: their help, what they start, which Python they use, and what they install."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vqrae.scripts.launch import JOBS
from vqrae.scripts.missing import missing

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.sh") if path.name != "lib.sh")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_needs_no_installation_and_starts_nothing(path: Path, repository: Any) -> None:
    assert len(path.read_text().splitlines()) <= 15
    result = repository.run(path.name, "--help", VIRTUAL_ENV="", MISSING="vqrae")
    assert result.returncode == 0, result.stderr
    assert f"bash scripts/{path.name}" in result.stdout
    assert "lib.sh" not in result.stdout
    assert all("missing.py" in " ".join(call) for call in repository.calls(""))
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_starts_exists(path: Path) -> None:
    for module in re.findall(r"launch ([\w.]+) ", path.read_text()):
        assert module in JOBS
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_arguments_reach_the_launcher(repository: Any) -> None:
    result = repository.run("train_llm.sh", "output=my folder", "nproc=2")
    assert result.returncode == 0, result.stderr
    start = "-m vqrae.scripts.launch"
    arguments = "quickstart.train_llm output=my folder nproc=2"
    lines = repository.log.read_text().splitlines()
    assert lines[1:] == [f"{start} --extras {arguments}", f"{start} {arguments}"]


@pytest.mark.parametrize(
    ("script", "argument", "module"),
    [
        ("eval_understanding", "model=m", "quickstart.scene_questions"),
        ("eval_understanding", "benchmark=pope", "eval.understanding.evaluate"),
    ],
)
def test_an_argument_chooses_the_evaluation(
    script: str, argument: str, module: str, repository: Any
) -> None:
    repository.run(f"{script}.sh", argument)
    assert repository.calls()[-1][2:] == [module, argument]


# ---- which Python


def test_an_active_environment_that_has_everything_is_used(repository: Any, tmp_path: Path) -> None:
    for name, folder in (("CONDA_PREFIX", tmp_path / "conda"), ("PYTHON", tmp_path / "own")):
        python = repository.make_python(folder)
        python.write_text(python.read_text().replace("$*", f"{name} $*", 1))
        chosen = {"VIRTUAL_ENV": "", name: str(folder if name == "CONDA_PREFIX" else python)}
        repository.run("train_llm.sh", **chosen)
        assert repository.calls()[-1][:2] == [name, "-m"]
        assert repository.calls(" install ") == []


@pytest.mark.parametrize(
    ("variable", "tail"), [("VIRTUAL_ENV", ""), ("CONDA_PREFIX", ""), ("PYTHON", "/bin/python")]
)
def test_what_the_chosen_environment_lacks_is_named(
    variable: str, tail: str, repository: Any
) -> None:
    environment = str(repository.folder.parent / "env")
    chosen = {"VIRTUAL_ENV": "", "CONDA_DEFAULT_ENV": "work", variable: environment + tail}
    result = repository.run("train_llava.sh", **chosen, MISSING="peft>=0.17")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert f"{environment}/bin/python lacks peft>=0.17" in line
    assert f"{environment}/bin/python -m pip install -c scripts/constraints.txt -e '.'" in line
    assert repository.calls(" install ") == repository.calls() == []


def test_the_base_of_conda_is_left_alone(repository: Any) -> None:
    conda = str(repository.folder.parent / "env")
    base = {"VIRTUAL_ENV": "", "CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "base"}
    result = repository.run("train_llm.sh", **base, MISSING="vqrae")
    assert "conda's base environment lacks vqrae: .venv is used instead" in result.stdout
    assert len(repository.calls(" install ")) == 1


def test_what_is_missing_is_asked_of_the_interpreter_itself(tmp_path: Path) -> None:
    assert missing(["dev", "lora"]) == []
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    bare = [str(tmp_path / "bin" / "python"), str(ROOT / "scripts" / "missing.py")]
    assert subprocess.run(bare, capture_output=True, text=True).stdout == "vqrae\n"


# ---- installing


def installs(repository: Any, script: str, **environment: str) -> int:
    repository.run(script, VIRTUAL_ENV="", **environment)
    return len(repository.calls(" install "))


def test_installs_once_and_again_when_more_is_needed_or_it_failed(repository: Any) -> None:
    result = repository.run("train_llm.sh", VIRTUAL_ENV="", INSTALL_FAILS="1")
    assert result.returncode != 0
    assert repository.calls() == []  # nothing was launched
    assert installs(repository, "train_llm.sh") == 1
    assert installs(repository, "train_llm.sh") == 0
    assert installs(repository, "train_llava.sh", EXTRAS="deepspeed lora") == 1
    assert repository.calls(" install ")[0][-1] == ".[deepspeed,lora]"
    assert installs(repository, "test.sh") == 1
    [call] = repository.calls(" install ")
    assert set(call[-1].strip(".[]").split(",")) == {"deepspeed", "dev", "lora"}  # lora is kept
    assert installs(repository, "train_llava.sh", EXTRAS="deepspeed lora") == 0
    with (repository.folder / "setup.py").open("a") as stream:
        stream.write("# a new requirement\n")
    assert installs(repository, "train_llm.sh") == 1


def test_uv_installs_with_what_pip_is_configured_for(repository: Any, tmp_path: Path) -> None:
    expected = {
        "UV_DEFAULT_INDEX": "",
        "UV_INDEX": "file:///a/simple https://b/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_CONSTRAINT": "mine.txt",
        "SSL_CERT_FILE": "/etc/cert.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    seen = tmp_path / "seen"
    show = [f'echo "{name}=${{{name}:-}}" >>{seen}\n' for name in expected]
    repository.make_tool(repository.tools / "uv", "".join(show))
    lines = [
        ":env:.find-links='/wheels /more'",
        "global.extra-index-url='\\nfile:///a/simple\\nhttps://b/simple'",
        "global.find-links='/other'",
        "user.cert='/etc/cert.pem'",
        "install.constraint='/etc/caps.txt'",
    ]
    (tmp_path / "pip.txt").write_text("\n".join(lines))
    repository.make_tool(repository.tools / "python3", f"cat {tmp_path / 'pip.txt'}\n")
    given = {"UV_CONSTRAINT": "mine.txt", "SSL_CERT_FILE": ""}
    result = repository.run("train_llm.sh", VIRTUAL_ENV="", **given)
    assert result.returncode == 0, result.stderr
    [call] = repository.calls("pip install")
    assert call[:3] == ["pip", "install", "--python"]
    assert call[3].endswith("/repo/.venv/bin/python")
    assert dict(line.split("=", 1) for line in seen.read_text().splitlines()) == expected


def test_launches_that_share_an_environment_install_once(repository: Any) -> None:
    environment = {**repository.environment, "VIRTUAL_ENV": "", "INSTALL_SECONDS": "1"}
    command = ["bash", str(repository.folder / "scripts" / "train_llm.sh")]
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(repository.calls(" install ")) == 1
    assert sum("waiting for" in output for output in outputs) == 1
    assert not list(repository.folder.glob(".venv.lock*"))


def test_the_lock_of_a_launch_that_was_killed_is_taken_over(repository: Any) -> None:
    lock = repository.folder / ".venv.lock.owner"
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock.symlink_to(f"{os.uname().nodename} {dead.pid}")
    assert installs(repository, "train_llm.sh") == 1
    assert not lock.is_symlink()
    assert installs(repository, "test.sh", INSTALL_FAILS="1") == 1
    assert not lock.is_symlink()  # a failure lets go of it


# ---- nodes


def test_the_batch_file_starts_every_node(repository: Any) -> None:
    batch = ROOT / "docs" / "train.sbatch"
    shutil.copy(batch, repository.folder / "scripts")
    # sbatch reads its options before the first command
    assert batch.read_text().splitlines()[2].startswith("#SBATCH ")
    repository.make_tool(repository.tools / "scontrol", "echo first; echo second\n")
    srun = 'shift; echo "$MASTER_ADDR $MASTER_PORT" >>"$CALLS"; exec "$@"\n'
    repository.make_tool(repository.tools / "srun", srun)
    job = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(repository.folder),
    }
    result = repository.run("train.sbatch", "sft.max_steps=3", **job)
    assert result.returncode == 0, result.stderr
    assert repository.calls("20007") == [["first", "20007"]]
    expected = ["understanding.train", "config=vicuna_7b", "nnodes=2", "sft.max_steps=3"]
    assert repository.calls()[-1][2:] == expected
