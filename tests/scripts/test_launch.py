"""What the launcher runs: missing artefacts, then the job, with processes, nodes and ZeRO."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import read

from vqrae.common.config import ConfigError
from vqrae.common.run import read_metrics
from vqrae.quickstart.train_llm import main as train_llm
from vqrae.scripts import launch
from vqrae.scripts.launch import JOBS, command_line, plan_commands

ROOT = Path(__file__).parents[2]
TRAININGS = [name for name, job in JOBS.items() if job.zero]
EVALUATIONS = [name for name, job in JOBS.items() if job.defaults or job.launches]
CONFIGURED = [name for name, job in JOBS.items() if job.config]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No artefacts, no GPUs, no cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def modules(module: str, *arguments: str) -> list[str]:
    return [command.module for command in plan_commands(module, arguments)]


def line(module: str, *arguments: str) -> list[str]:
    """The command line of the job itself, without the interpreter."""
    return command_line(plan_commands(module, arguments)[-1])[1:]


# ---- what is made first


def test_a_generator_needs_codes_a_tokenizer_and_its_encoder() -> None:
    commands = plan_commands("generation.train", [])
    assert [command.module for command in commands] == [
        "quickstart.pretrain_encoder",
        "tokenizer.train",
        "generation.extract_codes",
        "generation.train",
    ]
    assert "tokenizer=runs/tokenizer" in commands[2].arguments
    other = plan_commands("generation.train", ["tokenizer=mine"])
    assert other[0].arguments == ["tiny", "tokenizer=mine", "output_dir=runs/codes"]
    assert modules("generation.train", "tokenizer=t", "data=d") == ["generation.train"]
    assert modules("generation.train", "dry_run=1") == ["generation.train"]


def test_photographs_are_unpacked_once(empty_folder: Path) -> None:
    names = modules("tokenizer.train", "config=photographs")
    assert names == ["quickstart.pretrain_encoder", "data.photographs", "tokenizer.train"]
    train = empty_folder / "runs" / "photographs" / "train"
    train.mkdir(parents=True)
    (train / "SOURCES.md").touch()
    names = modules("tokenizer.train", "config=photographs", "encoder=mine")
    assert names == ["tokenizer.train"]


@pytest.mark.parametrize("module", EVALUATIONS)
def test_an_evaluation_makes_its_model_only_if_none_is_given(module: str) -> None:
    given = [f"{key}=mine" for key in JOBS[module].prepare]
    assert modules(module, *given) == [module]
    if given:
        assert len(modules(module)) > 1


def test_what_the_quickstart_has_made_is_taken(empty_folder: Path) -> None:
    for name in ("tokenizer", "llm"):
        model = empty_folder / "runs" / "quickstart" / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").touch()
    [command] = plan_commands("understanding.train", ["sft.max_steps=7"])
    paths = ["tokenizer=runs/quickstart/tokenizer", "llm=runs/quickstart/llm"]
    assert command.arguments == ["tiny", "sft.max_steps=7", *paths]


@pytest.mark.parametrize("name", ["tiny", "smollm2", "vicuna_7b"])
@pytest.mark.parametrize("arguments", [[], ["llm=mine"], ["tokenizer=mine", "zero=1"]])
def test_a_copied_configuration_behaves_like_the_original(
    name: str, arguments: list[str], empty_folder: Path
) -> None:
    copy = empty_folder / "what_a_name.yaml"
    shutil.copy(ROOT / "understanding" / "configs" / f"{name}.yaml", copy)
    original = plan_commands("understanding.train", [f"config={name}", *arguments])
    copied = plan_commands("understanding.train", [f"config={copy}", *arguments])
    assert [command.module for command in copied] == [command.module for command in original]
    assert copied[-1].arguments[1:] == original[-1].arguments[1:]
    assert (copied[-1].zero, copied[-1].extras) == (original[-1].zero, original[-1].extras)


def test_smollm2_is_fetched_first() -> None:
    *_, fetch, train = plan_commands("understanding.train", ["config=smollm2", "tokenizer=t"])
    assert (fetch.module, fetch.arguments) == ("understanding.smollm2", ["output=runs/smollm2"])
    assert fetch.extras == {"smollm2"}
    assert train.arguments == ["smollm2", "tokenizer=t"]


def test_nodes_do_not_all_make_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="runs/tokenizer does not exist: first, on one node, run"):
        plan_commands("understanding.train", ["nnodes=2"])


# ---- arguments


@pytest.mark.parametrize("module", CONFIGURED)
def test_every_training_reads_its_arguments(module: str) -> None:
    given = ["output=mine", *(["zero=1"] if JOBS[module].zero else [])]
    command = plan_commands(module, given)[-1]
    config = read(module, command.arguments)
    assert config.output_dir == command.output == "mine"


@pytest.mark.parametrize("module", EVALUATIONS)
def test_every_evaluation_reads_its_arguments(module: str) -> None:
    has_model = not JOBS[module].prepare
    config = read(module, plan_commands(module, ["model=mine"] if has_model else [])[-1].arguments)
    assert not has_model or config.model == "mine"


def test_short_keys_and_the_last_of_two_values() -> None:
    [command] = plan_commands(
        "tokenizer.train", ["data=emoji", "encoder=e", "output=a", "output_dir=b"]
    )
    assert command.arguments == ["tiny", "data.train=emoji", "model.encoder=e", "output_dir=b"]


def test_jobs_that_launch_others_are_one_process_and_know_the_number() -> None:
    given = ["nproc=3", "overrides=[data.num_workers=2]", "encoder=e"]
    words = line("eval.ablations.evaluate", *given)
    assert words[:2] == ["-m", "vqrae.eval.ablations.evaluate"]
    assert "nproc=3" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "expected key=value"),
        (["zero=4"], "zero: got 4"),
        (["nproc=0"], "nproc: got 0"),
        (["nnodes=two"], "nnodes: got 'two'"),
        (["config=tinny"], "Did you mean 'tiny'"),
        (["config=nowhere.yaml"], "does not exist"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_commands("tokenizer.train", arguments)


# ---- extras


@pytest.mark.parametrize(
    ("module", "arguments", "extras"),
    [
        ("tokenizer.train", [], set()),
        ("tokenizer.train", ["zero=2"], {"deepspeed"}),
        ("understanding.train", ["sft.zero=2"], {"deepspeed"}),
        ("understanding.train", ["config=vicuna_7b"], {"deepspeed"}),
        ("understanding.train", ["config=vicuna_7b", "zero=0"], set()),
        ("understanding.train", ["lora={}"], {"lora"}),
        ("understanding.train", ["lora.rank=64"], {"lora"}),
        ("eval.understanding.evaluate", [], {"eval"}),
        ("eval.dpg_bench.evaluate", ["judge=mplug"], {"mplug"}),
        ("eval.dpg_bench.evaluate", ["judge=scenes"], set()),
    ],
)
def test_what_a_job_needs_of_setup(module: str, arguments: list[str], extras: set[str]) -> None:
    assert plan_commands(module, arguments)[-1].extras == extras


def test_the_extras_are_those_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    launch.main(["--extras", "understanding.train", "config=smollm2", "zero=1"])
    assert capsys.readouterr().out == "deepspeed smollm2\n"


# ---- processes


@pytest.mark.parametrize("module", TRAININGS)
def test_zero_reaches_every_training_through_torchrun(module: str) -> None:
    words = line(module, "zero=1", "nproc=1")
    assert words[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    assert all(f"{key}=1" in words for key in JOBS[module].zero)
    assert line(module)[:2] == ["-m", f"vqrae.{module}"]


@pytest.mark.parametrize(("gpus", "processes"), [(0, 0), (1, 0), (3, 3)])
def test_a_process_for_each_gpu_that_torch_sees(
    gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    words = line("tokenizer.train", "encoder=e")
    assert (words[4] if "--nproc_per_node" in words else "0") == str(processes)


def test_nodes_meet_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["understanding.train", "nnodes=2", "nproc=8", "tokenizer=t", "llm=l"]
    with pytest.raises(ConfigError, match="needs MASTER_ADDR"):
        line(*given)
    monkeypatch.setenv("MASTER_ADDR", "first")
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "first:29500"]
    assert line(*given)[2:8] == ["--nnodes", "2", *meeting]
    monkeypatch.setenv("MASTER_PORT", "3")
    nodes = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "first", "--master_port", "3"]
    assert line(*given, "node_rank=1")[2:10] == nodes
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert line(*given)[2:10] == nodes


# ---- running them


def test_what_is_missing_runs_before_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr(launch, "run", lines.append)
    monkeypatch.setattr(os, "execv", lambda program, line: lines.append(line))
    launch.main(["understanding.train", "tokenizer=t"])
    job = ["-m", "vqrae.understanding.train", "tiny", "tokenizer=t"]
    assert [line[1:] for line in lines] == [
        ["-m", "vqrae.quickstart.train_llm", "tiny_llm", "output_dir=runs/llm"],
        job,
    ]


def test_a_job_that_fails_ends_the_launch_with_its_exit_code() -> None:
    launch.run([sys.executable, "-c", ""])
    with pytest.raises(SystemExit) as failed:
        launch.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert failed.value.code == 3
    with pytest.raises(SystemExit) as killed:
        launch.run(["bash", "-c", "kill -TERM $$"])
    assert killed.value.code == 143


@pytest.mark.slow
def test_two_nodes_train_what_one_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "optimization.max_steps=2"]
    small += ["optimization.logging_steps=1", "optimization.bf16=false"]
    small += ["optimization.global_batch_size=4", "optimization.micro_batch_size=2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    given = ["quickstart.train_llm", "nnodes=2", "output=two", *small]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    lines = [[sys.executable, *line(*given, f"node_rank={rank}")] for rank in range(2)]
    nodes = [subprocess.Popen(words, **pipes) for words in lines]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "llm 2/2" in outputs[0][0]
    assert "llm 2/2" not in outputs[1][0]  # the first node speaks for all
    train_llm(["tiny_llm", "output_dir=one", *small])
    two, one = ([row["loss"] for row in read_metrics(name)] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(two) == 2
