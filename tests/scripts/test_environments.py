"""Which Python the scripts use, what they install, and how many processes and nodes they start."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vqrae.common.run import read_metrics
from vqrae.quickstart.train_llm import main as train_llm

ROOT = Path(__file__).parents[2]


def installs(repository: Any, script: str, **environment: str) -> int:
    repository.run(script, VIRTUAL_ENV="", **environment)
    return len(repository.calls(" install "))


def test_installs_once_and_again_when_the_requirements_change(repository: Any) -> None:
    assert installs(repository, "train_llm.sh") == 1
    assert installs(repository, "train_llm.sh") == 0
    assert installs(repository, "test.sh") == 1  # wants more
    assert installs(repository, "test.sh") == 0
    with (repository.folder / "setup.py").open("a") as stream:
        stream.write("# a new requirement\n")
    assert installs(repository, "train_llm.sh") == 1


def test_an_install_that_failed_starts_over(repository: Any) -> None:
    result = repository.run("train_llm.sh", VIRTUAL_ENV="", INSTALL_FAILS="1")
    assert result.returncode != 0
    assert repository.calls() == []  # nothing was launched
    assert installs(repository, "train_llm.sh") == 1


def test_an_active_environment_that_has_everything_is_used(repository: Any, tmp_path: Path) -> None:
    repository.run("train_llm.sh")
    assert repository.calls(" install ") == []
    for name, folder in (("CONDA_PREFIX", tmp_path / "conda"), ("PYTHON", tmp_path / "own")):
        python = repository.make_python(folder)
        chosen = {"VIRTUAL_ENV": "", name: str(folder if name == "CONDA_PREFIX" else python)}
        result = repository.run("train_llm.sh", **chosen)
        assert f"+ {python} -m vqrae.quickstart.train_llm" in result.stdout
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
    assert f"{environment}/bin/python lacks peft>=0.17" in result.stderr
    assert (
        f"{environment}/bin/python -m pip install -c scripts/constraints.txt -e '.'"
        in result.stderr
    )
    assert result.stderr.count("\n") == 1
    assert repository.calls(" install ") == repository.calls() == []


def test_the_base_of_conda_is_left_alone(repository: Any) -> None:
    base = {
        "VIRTUAL_ENV": "",
        "CONDA_PREFIX": str(repository.folder.parent / "env"),
        "CONDA_DEFAULT_ENV": "base",
    }
    result = repository.run("train_llm.sh", **base, MISSING="vqrae")
    assert "conda's base environment lacks vqrae: .venv is used instead" in result.stdout
    assert len(repository.calls(" install ")) == 1
    assert "/repo/.venv/bin/python" in result.stdout


def test_extras_are_kept_when_another_is_installed(repository: Any) -> None:
    assert installs(repository, "test.sh") == 1
    repository.run("eval_understanding.sh", "model=m", "benchmark=pope", VIRTUAL_ENV="")
    [call] = repository.calls(" install ")
    assert sorted(call[-1].strip(".[]").split(",")) == ["deepspeed", "dev", "eval"]
    assert installs(repository, "test.sh") == 0


def test_uv_installs_with_what_pip_is_configured_for(repository: Any, tmp_path: Path) -> None:
    variables = (
        "UV_DEFAULT_INDEX",
        "UV_INDEX",
        "UV_FIND_LINKS",
        "UV_CONSTRAINT",
        "SSL_CERT_FILE",
        "UV_INDEX_STRATEGY",
    )
    seen = tmp_path / "seen"
    show = "".join(f'echo "{name}=${{{name}:-}}" >>{seen}\n' for name in variables)
    repository.make_tool(repository.tools / "uv", show)
    lines = [
        ":env:.find-links='/wheels /more'",
        "global.extra-index-url='\\nfile:///a/simple\\nhttps://b/simple'",
        "global.find-links='/other'",
        "user.cert='/etc/cert.pem'",
        "install.constraint='/etc/caps.txt'",
    ]
    (tmp_path / "pip.txt").write_text("\n".join(lines))
    repository.make_tool(repository.tools / "python3", f"cat {tmp_path / 'pip.txt'}\n")
    result = repository.run(
        "train_llm.sh", VIRTUAL_ENV="", UV_CONSTRAINT="mine.txt", SSL_CERT_FILE=""
    )
    assert result.returncode == 0, result.stderr
    [call] = repository.calls("pip install")
    assert call[:3] == ["pip", "install", "--python"]
    assert call[3].endswith("/repo/.venv/bin/python")
    expected = [
        "",
        "file:///a/simple https://b/simple",
        "/wheels,/more",
        "mine.txt",
        "/etc/cert.pem",
        "unsafe-best-match",
    ]
    assert seen.read_text().splitlines() == [
        f"{name}={value}" for name, value in zip(variables, expected, strict=True)
    ]


@pytest.mark.parametrize("flock", [True, False])
def test_launches_that_share_an_environment_install_once(flock: bool, repository: Any) -> None:
    if not flock:
        hide(repository, "flock")
    environment = {**repository.environment, "VIRTUAL_ENV": "", "INSTALL_SECONDS": "1"}
    command = ["bash", str(repository.folder / "scripts" / "train_llm.sh")]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(repository.calls(" install ")) == 1
    assert len(repository.calls()) == 2
    assert sum("waiting for" in output for output in outputs) == 1
    assert not (repository.folder / ".venv.lock.d").exists()


def test_the_lock_of_a_launch_that_was_killed_is_taken_over(repository: Any) -> None:
    hide(repository, "flock")
    lock = repository.folder / ".venv.lock.d"
    lock.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (lock / "owner").write_text(f"{os.uname().nodename} {dead.pid}\n")
    assert installs(repository, "train_llm.sh") == 1
    assert not lock.exists()
    assert installs(repository, "test.sh", INSTALL_FAILS="1") == 1
    assert not lock.exists()  # a failure lets go of it


def hide(repository: Any, name: str) -> None:
    """Let the scripts find every command of PATH but this one."""
    for folder in reversed(os.environ["PATH"].split(":")):
        for tool in Path(folder).glob("*"):
            link = repository.tools / tool.name
            if tool.name != name and not link.exists():
                link.symlink_to(tool)
    repository.environment["PATH"] = str(repository.tools)


# ---- GPUs


@pytest.mark.parametrize(("gpus", "processes"), [("0", None), ("1", None), ("3", "3")])
def test_a_process_for_each_gpu_that_torch_sees(
    gpus: str, processes: str | None, repository: Any
) -> None:
    repository.make_tool(
        repository.tools / "nvidia-smi", "for i in 0 1 2 3 4 5 6 7; do echo GPU $i: H100; done"
    )
    result = repository.run("train_llm.sh", GPUS=gpus)
    call = next(call for call in repository.calls() if "vqrae.quickstart.train_llm" in call)
    assert (
        call[call.index("--nproc_per_node") + 1] if "--nproc_per_node" in call else None
    ) == processes
    assert ("torch in" in result.stderr) == (
        gpus == "0"
    )  # GPUs that torch cannot use are not passed over in silence
    hidden = repository.run("train_llm.sh", GPUS="0", CUDA_VISIBLE_DEVICES="")
    assert hidden.stderr == ""


def test_torch_itself_is_asked(tmp_path: Path) -> None:
    program = '. scripts/lib.sh; PYTHON=$1; echo "processes $(processes)"; echo "missing $(missing_packages dev lora)"'
    command = ["bash", "-c", program, str(ROOT / "scripts" / "lib.sh"), sys.executable]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "processes 1\nmissing \n", result.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    bare = [*command[:-1], str(tmp_path / "bin" / "python")]
    result = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert "torch cannot be imported" in result.stderr
    assert result.stdout.endswith("missing vqrae\n")


# ---- nodes


def test_the_batch_file_starts_every_node(repository: Any) -> None:
    batch = ROOT / "docs" / "train.sbatch"
    shutil.copy(batch, repository.folder / "scripts")
    assert (
        batch.read_text().splitlines()[2].startswith("#SBATCH ")
    )  # sbatch reads them before the first command
    repository.make_tool(repository.tools / "scontrol", "echo first; echo second\n")
    repository.make_tool(repository.tools / "srun", 'shift; SLURM_NODEID=1 exec "$@"\n')
    job = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(repository.folder),
    }
    result = repository.run("train.sbatch", "sft.max_steps=3", **job, GPUS="8")
    assert result.returncode == 0, result.stderr
    nodes = [
        "--nnodes",
        "2",
        "--node_rank",
        "1",
        "--master_addr",
        "first",
        "--master_port",
        "20007",
        "--nproc_per_node",
        "8",
    ]
    [call] = repository.calls("-m torch.distributed.run")
    assert call[2:12] == nodes
    assert call[-2:] == ["vicuna_7b", "sft.max_steps=3"]


def test_nodes_do_not_all_make_what_is_missing(repository: Any) -> None:
    result = repository.run("train_llava.sh", "nnodes=2", MASTER_ADDR="first")
    assert result.returncode == 2
    assert "first, on one node, run scripts/train_tokenizer.sh" in result.stderr
    assert repository.calls() == []


@pytest.mark.slow
def test_two_nodes_train_what_one_trains(repository: Any, tmp_path: Path) -> None:
    small = [
        "model.hidden_size=32",
        "model.num_hidden_layers=1",
        "optimization.max_steps=2",
        "optimization.logging_steps=1",
    ]
    small += [
        "optimization.global_batch_size=4",
        "optimization.micro_batch_size=2",
        "optimization.bf16=false",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {
        **repository.environment,
        **meeting,
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        "bash",
        str(ROOT / "scripts" / "train_llm.sh"),
        "nnodes=2",
        f"output={tmp_path / 'two'}",
        *small,
    ]
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    nodes = [
        subprocess.Popen([*command, f"node_rank={rank}"], env=environment, text=True, **pipes)
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "llm 2/2" in outputs[0][0]
    assert "llm 2/2" not in outputs[1][0]  # the first node speaks for all
    train_llm(["tiny_llm", f"output_dir={tmp_path / 'one'}", *small])
    two, one = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(two) == 2
