"""The shell scripts: help, what they launch, and an installation that survives being cut short.

They run against a copy of the repository's scripts with a Python that only writes down how it was called.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vqrae.common.cli import parse_arguments
from vqrae.common.config import load_config, shipped_config
from vqrae.common.run import read_metrics
from vqrae.eval.ablations import AblationConfig
from vqrae.eval.dpg_bench.evaluate import DPGConfig
from vqrae.eval.features import FeaturesConfig
from vqrae.eval.generation import GenerationConfig as GenerationEvaluation
from vqrae.eval.geneval.evaluate import GenEvalConfig
from vqrae.eval.reconstruction import ReconstructionConfig
from vqrae.eval.scene_questions import SceneQuestionsConfig
from vqrae.eval.understanding import UnderstandingConfig
from vqrae.generation.config import TrainingConfig, read_config
from vqrae.tokenizer.pretrain_encoder import EncoderPretrainingConfig
from vqrae.tokenizer.train_config import TokenizerTrainConfig
from vqrae.understanding.train import TrainConfig
from vqrae.understanding.train_llm import TinyLLMConfig
from vqrae.understanding.train_llm import main as train_llm

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.sh") if path.name != "lib.sh")
TRAININGS = ["pretrain_encoder", "train_tokenizer", "train_llm", "train_llava", "train_ar_gen"]
EVALUATIONS = ["eval_reconstruction", "eval_features", "eval_understanding", "eval_geneval", "eval_dpg"]
# What reads the command line of each training module.
READERS: dict[str, Callable[[list[str]], object]] = {
    "vqrae.tokenizer.pretrain_encoder": lambda a: load_config(
        EncoderPretrainingConfig, shipped_config("vqrae.tokenizer", a[0]), a[1:]
    ),
    "vqrae.tokenizer.train": lambda a: load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", a[0]), a[1:]),
    "vqrae.understanding.train_llm": lambda a: load_config(TinyLLMConfig, shipped_config("vqrae.understanding", a[0]), a[1:]),
    "vqrae.understanding.train": lambda a: load_config(TrainConfig, shipped_config("vqrae.understanding", a[0]), a[1:]),
    "vqrae.generation.extract_codes": lambda a: read_config(a, "extraction"),
    "vqrae.generation.train": lambda a: read_config(a, "training"),
    "vqrae.eval.reconstruction": lambda a: parse_arguments(ReconstructionConfig, a),
    "vqrae.eval.features": lambda a: parse_arguments(FeaturesConfig, a),
    "vqrae.eval.scene_questions": lambda a: parse_arguments(SceneQuestionsConfig, a),
    "vqrae.eval.ablations": lambda a: parse_arguments(AblationConfig, a),
    "vqrae.eval.understanding": lambda a: parse_arguments(UnderstandingConfig, a),
    "vqrae.eval.generation": lambda a: parse_arguments(GenerationEvaluation, a),
    "vqrae.eval.geneval.evaluate": lambda a: parse_arguments(GenEvalConfig, a),
    "vqrae.eval.dpg_bench.evaluate": lambda a: parse_arguments(DPGConfig, a),
}


# Variables of whoever runs the tests that would choose an environment or a launch.
FOREIGN = ("VIRTUAL_ENV", "CONDA_", "PYTHON", "UV_", "PIP_", "SLURM_", "MASTER_", "CUDA_")


class Repository:
    """A copy of the scripts, and an active environment whose `python` records its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "repo", folder / "calls"
        shutil.copytree(ROOT / "scripts", self.folder / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        self.make_python(folder / "env")
        self.make_python(self.folder / ".venv")
        self.tools = folder / "tools"
        self.tools.mkdir()
        clean = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        tools = {"CALLS": str(self.log), "PATH": f"{self.tools}:{os.environ['PATH']}"}
        self.environment = {**clean, "VIRTUAL_ENV": str(folder / "env"), **tools}

    def make_python(self, environment: Path) -> Path:
        """A Python that lacks $MISSING, sees $GPUS, takes $SECONDS to install, and really reads configurations."""
        return self.make_tool(
            environment / "bin" / "python",
            'case "$*" in\n'
            f'"- vqrae."*) exec {sys.executable} "$@" ;;\n'
            '"- "*) cat >/dev/null; [ -z "${MISSING:-}" ] || echo "$MISSING" ;;\n'
            '"-c import torch"*) echo "${GPUS:-0}" ;;\n'
            '*" install "*) sleep ${INSTALL_SECONDS:-0}; exit ${INSTALL_FAILS:-0} ;;\n'
            "esac\n",
        )

    @staticmethod
    def make_tool(path: Path, answers: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\necho "$*" >>"$CALLS"\n' + answers)
        path.chmod(0o755)
        return path

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        command = ["bash", str(self.folder / "scripts" / script), *arguments]
        return subprocess.run(
            command, cwd=self.folder.parent, env={**self.environment, **environment}, capture_output=True, text=True
        )

    def calls(self, word: str = "-m vqrae.") -> list[list[str]]:
        """The recorded calls that contain `word`."""
        return [line.split() for line in self.log.read_text().splitlines() if word in line]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def read(call: list[str]) -> object:
    """The configuration that a launched module would run with."""
    start = max(i for i, word in enumerate(call) if word == "-m") + 1
    return READERS[call[start]](call[start + 1 :])


# ---- help and names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_says_what_and_how(path: Path) -> None:
    result = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert f"bash scripts/{path.name}" in result.stdout
    assert "lib.sh" not in result.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "scripts" / "lib.sh", ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_everything_a_script_names_exists(path: Path) -> None:
    text = path.read_text()
    for module in re.findall(r"(?:launch|-m) (vqrae[\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for script in re.findall(r"[a-z_]+\.sh\b", text):
        assert (ROOT / "scripts" / script).is_file(), script
    for folder in re.findall(r"a name in ([a-z/]+configs)", text):
        assert list((ROOT / folder).glob("*.yaml")), folder
    subprocess.run(["bash", "-n", str(path)], check=True)


# ---- what is launched


@pytest.mark.parametrize(
    "script", ["pretrain_encoder", "train_tokenizer", "train_llm", "train_llava", "extract_codes", "train_ar_gen"]
)
def test_a_bare_call_launches_the_embedded_default(script: str, repository: Repository) -> None:
    result = repository.run(f"{script}.sh")
    assert result.returncode == 0, result.stderr
    last = repository.calls()[-1]
    assert last[0] == "-m"  # a plain process
    assert read(last)


@pytest.mark.parametrize("script", EVALUATIONS)
def test_an_evaluation_needs_a_model_only(script: str, repository: Repository) -> None:
    result = repository.run(f"{script}.sh", "model=m")
    assert result.returncode == 0, result.stderr
    [call] = repository.calls()
    assert read(call)


def test_an_ablation_launches_its_trainings_itself(repository: Repository) -> None:
    result = repository.run("ablate.sh", "nproc=3", "overrides=[data.num_workers=2,stage1.max_steps=4]")
    assert result.returncode == 0, result.stderr
    pretraining, call = repository.calls()
    assert pretraining[1] == "vqrae.tokenizer.pretrain_encoder"
    assert call[0] == "-m"  # a plain process
    config = AblationConfig(nproc=3, overrides=("data.num_workers=2", "stage1.max_steps=4"))
    assert read(call) == config


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("eval_geneval", ["prompts_only=true", "out=o"]),
        ("eval_geneval", ["images=.", "detector=transformers"]),
        ("eval_geneval", ["model=m", "seed=43"]),
        ("eval_dpg", ["images=.", "pictures_per_prompt=4"]),
    ],
)
def test_benchmarks_with_their_own_prompts_make_no_model(script: str, arguments: list[str], repository: Repository) -> None:
    result = repository.run(f"{script}.sh", *arguments)
    assert result.returncode == 0, result.stderr
    [call] = repository.calls()
    assert read(call)


def test_understanding_goes_through_lmms_eval_when_asked(repository: Repository) -> None:
    repository.run("eval_understanding.sh", "model=m", "benchmark=pope,mme", "nproc=2", "limit=5")
    [call] = repository.calls()
    assert "torch.distributed.run" in call
    config = read(call)
    assert isinstance(config, UnderstandingConfig)
    assert (config.names(), config.limit, config.output) == (["pope", "mme"], 5, "runs/evaluation/understanding")
    repository.run("eval_understanding.sh", "model=m", "benchmark=lmms_scenes")
    config = read(repository.calls()[0])
    assert isinstance(config, UnderstandingConfig)
    assert config.names() == ["scenes"]


def test_missing_artefacts_are_made_first(repository: Repository) -> None:
    repository.run("train_ar_gen.sh")
    modules = [call[1].removeprefix("vqrae.") for call in repository.calls()]
    assert modules == ["tokenizer.pretrain_encoder", "tokenizer.train", "generation.extract_codes", "generation.train"]
    assert "tokenizer=runs/tokenizer" in repository.calls()[2]


def test_artefacts_of_the_quickstart_are_found(repository: Repository) -> None:
    for name in ("tokenizer", "llm"):
        model = repository.folder / "runs" / "quickstart" / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    repository.run("train_llava.sh", "sft.max_steps=7", "output=somewhere")
    [call] = repository.calls()
    config = read(call)
    assert isinstance(config, TrainConfig)
    assert (config.tokenizer, config.llm) == ("runs/quickstart/tokenizer", "runs/quickstart/llm")
    assert (config.output_dir, config.sft.max_steps) == ("somewhere", 7)


def test_processes_nodes_and_zero_choose_the_launch(repository: Repository) -> None:
    given = ["tokenizer=t", "llm=l"]
    repository.run("train_llava.sh", "nproc=2", "zero=2", *given)
    [call] = repository.calls()
    assert call[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    config = read(call)
    assert isinstance(config, TrainConfig)
    assert (config.pretrain.zero, config.sft.zero) == (2, 2)
    repository.run("train_llava.sh", "zero=3", *given)  # DeepSpeed needs the launcher's variables even for one process
    assert "torch.distributed.run" in repository.calls()[0]
    assert repository.run("train_llava.sh", "nnodes=2", *given).returncode == 2
    repository.run("train_llava.sh", "nnodes=2", *given, MASTER_ADDR="first")
    assert repository.calls()[0][2:8] == ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "first:29500"]
    static = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "first", "--master_port", "3"]
    for rank in ({}, {"SLURM_NODEID": "1"}):
        chosen = [] if rank else ["node_rank=1"]
        repository.run("train_llava.sh", "nnodes=2", *chosen, *given, MASTER_ADDR="first", MASTER_PORT="3", **rank)
        assert repository.calls()[0][2:10] == static


def test_the_batch_file_starts_every_node(repository: Repository) -> None:
    batch = ROOT / "docs" / "train.sbatch"
    shutil.copy(batch, repository.folder / "scripts")
    assert batch.read_text().splitlines()[2].startswith("#SBATCH ")  # sbatch reads them before the first command
    repository.make_tool(repository.tools / "scontrol", "echo first; echo second\n")
    repository.make_tool(repository.tools / "srun", 'shift; SLURM_NODEID=1 exec "$@"\n')
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(repository.folder)}
    result = repository.run("train.sbatch", "sft.max_steps=3", **job, GPUS="8")
    assert result.returncode == 0, result.stderr
    nodes = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "first", "--master_port", "20007", "--nproc_per_node", "8"]
    [call] = repository.calls("-m torch.distributed.run")
    assert call[2:12] == nodes
    assert call[-2:] == ["vicuna_7b", "sft.max_steps=3"]


def test_nodes_do_not_all_make_what_is_missing(repository: Repository) -> None:
    result = repository.run("train_llava.sh", "nnodes=2", MASTER_ADDR="first")
    assert result.returncode == 2
    assert "first, on one node, run scripts/train_tokenizer.sh" in result.stderr
    assert repository.calls() == []


@pytest.mark.slow
def test_two_nodes_train_what_one_trains(tmp_path: Path) -> None:
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "optimization.max_steps=2", "optimization.logging_steps=1"]
    small += ["optimization.global_batch_size=4", "optimization.micro_batch_size=2", "optimization.bf16=false"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    environment = {**clean, **meeting, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "train_llm.sh"), "nnodes=2", f"output={tmp_path / 'two'}", *small]
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    nodes = [subprocess.Popen([*command, f"node_rank={rank}"], env=environment, text=True, **pipes) for rank in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "llm 2/2" in outputs[0][0]
    assert "llm 2/2" not in outputs[1][0]  # the first node speaks for all
    train_llm(["tiny_llm", f"output_dir={tmp_path / 'one'}", *small])
    two, one = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(two) == 2


# ---- GPUs


@pytest.mark.parametrize(("gpus", "processes"), [("0", None), ("1", None), ("3", "3")])
def test_a_process_for_each_gpu_that_torch_sees(gpus: str, processes: str | None, repository: Repository) -> None:
    repository.make_tool(repository.tools / "nvidia-smi", "for i in 0 1 2 3 4 5 6 7; do echo GPU $i: H100; done")
    result = repository.run("train_llm.sh", GPUS=gpus)
    call = next(call for call in repository.calls() if "vqrae.understanding.train_llm" in call)
    assert (call[call.index("--nproc_per_node") + 1] if "--nproc_per_node" in call else None) == processes
    assert ("torch in" in result.stderr) == (gpus == "0")  # GPUs that torch cannot use are not passed over in silence
    hidden = repository.run("train_llm.sh", GPUS="0", CUDA_VISIBLE_DEVICES="")
    assert hidden.stderr == ""


def test_torch_itself_is_asked(tmp_path: Path) -> None:
    program = '. scripts/lib.sh; PYTHON=$1; echo "processes $(processes)"; echo "missing $(missing_packages dev lora)"'
    command = ["bash", "-c", program, str(ROOT / "scripts" / "lib.sh"), sys.executable]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert result.stdout == "processes 1\nmissing \n", result.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    bare = [*command[:-1], str(tmp_path / "bin" / "python")]
    result = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert "torch cannot be imported" in result.stderr
    assert result.stdout.endswith("missing vqrae\n")


def test_what_is_given_wins_over_the_defaults(repository: Repository) -> None:
    for key in ("output", "output_dir"):
        repository.run("train_llm.sh", f"{key}=mine")
        config = read(repository.calls()[0])
        assert isinstance(config, TinyLLMConfig)
        assert config.output_dir == "mine"


@pytest.mark.parametrize("name", ["mine.yaml", "tiny_of_mine.yaml"])
def test_a_configuration_of_ones_own_behaves_like_what_it_was_copied_from(name: str, repository: Repository) -> None:
    own = repository.folder / name
    own.write_text((ROOT / "understanding" / "configs" / "tiny.yaml").read_text())
    repository.run("train_llava.sh", f"config={name}")
    modules = [call[1].removeprefix("vqrae.") for call in repository.calls()]
    assert modules == ["tokenizer.pretrain_encoder", "tokenizer.train", "understanding.train_llm", "understanding.train"]
    assert repository.calls()[-1][2:] == [name, "tokenizer=runs/tokenizer", "llm=runs/llm"]
    own.write_text((ROOT / "understanding" / "configs" / "vicuna_7b.yaml").read_text())
    repository.run("train_llava.sh", f"config={name}")
    [call] = repository.calls()  # it names its own models, and asks for DeepSpeed
    assert call[-2:] == ["vqrae.understanding.train", name]
    assert "torch.distributed.run" in call
    repository.run("train_llava.sh", f"config={name}", "zero=0")
    assert repository.calls()[0][:2] == ["-m", "vqrae.understanding.train"]
    own.write_text((ROOT / "understanding" / "configs" / "smollm2.yaml").read_text())
    repository.run("train_llava.sh", f"config={name}", "tokenizer=t")
    assert repository.calls()[0][1:] == ["vqrae.understanding.smollm2", "runs/smollm2"]


def test_an_unknown_configuration_is_refused_before_the_launch(repository: Repository) -> None:
    result = repository.run("train_tokenizer.sh", "config=tinny")
    assert result.returncode == 2
    assert "Did you mean 'tiny'?" in result.stderr
    assert repository.calls() == []


def test_zero_of_a_key_counts(repository: Repository) -> None:
    repository.run("train_llava.sh", "sft.zero=2", "tokenizer=t", "llm=l")
    assert "torch.distributed.run" in repository.calls()[0]


def test_full_size_configurations_hold_their_own_defaults(repository: Repository) -> None:
    repository.run("train_ar_gen.sh", "config=qwen3_0_6b")
    [call] = repository.calls()
    assert call[-2:] == ["vqrae.generation.train", "qwen3_0_6b"]
    assert "torch.distributed.run" in call


@pytest.mark.parametrize("config", ["smollm2", "vicuna_7b", "vicuna_13b", "qwen2_5_7b"])
def test_language_models_of_llava(config: str, repository: Repository) -> None:
    result = repository.run("train_llava.sh", f"config={config}", "tokenizer=t", "stage=sft", "lora={}")
    assert result.returncode == 0, result.stderr
    *before, call = repository.calls()
    assert ("torch.distributed.run" in call) == (config != "smollm2")
    assert [c[1:] for c in before] == ([["vqrae.understanding.smollm2", "runs/smollm2"]] if config == "smollm2" else [])
    trained = read(call)
    assert isinstance(trained, TrainConfig)
    assert trained.output_dir.endswith(config)
    assert trained.lora is not None
    assert trained.lora.rank == 128


def test_a_dry_run_of_a_published_variant(repository: Repository) -> None:
    repository.run("train_tokenizer.sh", "config=siglip2_256", "stage=2", "dry_run=1", "micro_batch_size=2")
    [call] = repository.calls()
    config = read(call)
    assert isinstance(config, TokenizerTrainConfig)
    assert (config.dry_run, config.stage, config.stage_config(2).micro_batch_size) == (1, 2, 2)


def test_a_dry_run_of_the_generator_makes_no_artefacts(repository: Repository) -> None:
    for config in ("qwen3_0_6b", "tiny"):
        repository.run("train_ar_gen.sh", f"config={config}", "dry_run=1")
        [call] = repository.calls()
        settings = read(call)
        assert isinstance(settings, TrainingConfig)
        assert settings.dry_run == 1


@pytest.mark.parametrize("script", TRAININGS)
def test_zero_reaches_every_training(script: str, repository: Repository) -> None:
    repository.run(f"{script}.sh", "zero=1", "tokenizer=t", "llm=l", "encoder=e", "data=d")
    [call] = repository.calls()
    assert any(word.endswith("zero=1") for word in call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fast"], "expected key=value"), (["zero=4"], "zero must be"), (["nproc=0"], "nproc and nnodes")],
)
def test_mistakes_are_refused_before_anything_starts(arguments: list[str], message: str, repository: Repository) -> None:
    result = repository.run("train_tokenizer.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert repository.calls("") == []


# ---- installation


def installs(repository: Repository, script: str, **environment: str) -> int:
    repository.run(script, VIRTUAL_ENV="", **environment)
    return len(repository.calls(" install "))


def test_installs_once_and_again_when_the_requirements_change(repository: Repository) -> None:
    assert installs(repository, "train_llm.sh") == 1
    assert installs(repository, "train_llm.sh") == 0
    assert installs(repository, "test.sh") == 1  # wants more
    assert installs(repository, "test.sh") == 0
    with (repository.folder / "setup.py").open("a") as stream:
        stream.write("# a new requirement\n")
    assert installs(repository, "train_llm.sh") == 1


def test_an_install_that_failed_starts_over(repository: Repository) -> None:
    result = repository.run("train_llm.sh", VIRTUAL_ENV="", INSTALL_FAILS="1")
    assert result.returncode != 0
    assert repository.calls() == []  # nothing was launched
    assert installs(repository, "train_llm.sh") == 1


def test_an_active_environment_that_has_everything_is_used(repository: Repository, tmp_path: Path) -> None:
    repository.run("train_llm.sh")
    assert repository.calls(" install ") == []
    for name, folder in (("CONDA_PREFIX", tmp_path / "conda"), ("PYTHON", tmp_path / "own")):
        python = repository.make_python(folder)
        chosen = {"VIRTUAL_ENV": "", name: str(folder if name == "CONDA_PREFIX" else python)}
        result = repository.run("train_llm.sh", **chosen)
        assert f"+ {python} -m vqrae.understanding.train_llm" in result.stdout
        assert repository.calls(" install ") == []


@pytest.mark.parametrize(
    "chosen", [{"VIRTUAL_ENV": "E"}, {"CONDA_PREFIX": "E", "CONDA_DEFAULT_ENV": "work"}, {"PYTHON": "E/bin/python"}]
)
def test_what_the_chosen_environment_lacks_is_named(chosen: dict[str, str], repository: Repository) -> None:
    environment = str(repository.folder.parent / "env")
    values = {key: value.replace("E", environment) for key, value in chosen.items() if value != "work"}
    result = repository.run("train_llava.sh", **{**chosen, "VIRTUAL_ENV": "", **values}, MISSING="peft>=0.17")
    assert result.returncode == 2
    assert f"{environment}/bin/python lacks peft>=0.17" in result.stderr
    assert f"{environment}/bin/python -m pip install -c scripts/constraints.txt -e '.'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert repository.calls(" install ") == repository.calls() == []


def test_the_base_of_conda_is_left_alone(repository: Repository) -> None:
    base = {"VIRTUAL_ENV": "", "CONDA_PREFIX": str(repository.folder.parent / "env"), "CONDA_DEFAULT_ENV": "base"}
    result = repository.run("train_llm.sh", **base, MISSING="vqrae")
    assert "conda's base environment lacks vqrae: .venv is used instead" in result.stdout
    assert len(repository.calls(" install ")) == 1
    assert "/repo/.venv/bin/python" in result.stdout


def test_extras_are_kept_when_another_is_installed(repository: Repository) -> None:
    assert installs(repository, "test.sh") == 1
    repository.run("eval_understanding.sh", "model=m", "benchmark=pope", VIRTUAL_ENV="")
    [call] = repository.calls(" install ")
    assert sorted(call[-1].strip(".[]").split(",")) == ["deepspeed", "dev", "eval"]
    assert installs(repository, "test.sh") == 0


def test_uv_installs_with_what_pip_is_configured_for(repository: Repository, tmp_path: Path) -> None:
    variables = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "UV_CONSTRAINT", "SSL_CERT_FILE", "UV_INDEX_STRATEGY")
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
    result = repository.run("train_llm.sh", VIRTUAL_ENV="", UV_CONSTRAINT="mine.txt", SSL_CERT_FILE="")
    assert result.returncode == 0, result.stderr
    [call] = repository.calls("pip install")
    assert call[:3] == ["pip", "install", "--python"]
    assert call[3].endswith("/repo/.venv/bin/python")
    expected = ["", "file:///a/simple https://b/simple", "/wheels,/more", "mine.txt", "/etc/cert.pem", "unsafe-best-match"]
    assert seen.read_text().splitlines() == [f"{name}={value}" for name, value in zip(variables, expected, strict=True)]


@pytest.mark.parametrize("flock", [True, False])
def test_launches_that_share_an_environment_install_once(flock: bool, repository: Repository) -> None:
    if not flock:
        hide(repository, "flock")
    environment = {**repository.environment, "VIRTUAL_ENV": "", "INSTALL_SECONDS": "1"}
    command = ["bash", str(repository.folder / "scripts" / "train_llm.sh")]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(repository.calls(" install ")) == 1
    assert len(repository.calls()) == 2
    assert sum("waiting for" in output for output in outputs) == 1
    assert not (repository.folder / ".venv.lock.d").exists()


def test_the_lock_of_a_launch_that_was_killed_is_taken_over(repository: Repository) -> None:
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


def hide(repository: Repository, name: str) -> None:
    """Let the scripts find every command of PATH but this one."""
    for folder in reversed(os.environ["PATH"].split(":")):
        for tool in Path(folder).glob("*"):
            link = repository.tools / tool.name
            if tool.name != name and not link.exists():
                link.symlink_to(tool)
    repository.environment["PATH"] = str(repository.tools)
