"""The shell scripts: their help, and what they launch."""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqrae.common.cli import parse
from vqrae.common.config import load_config, shipped_config
from vqrae.eval.ablations.evaluate import AblationConfig
from vqrae.eval.dpg_bench.evaluate import DPGConfig
from vqrae.eval.features.evaluate import FeaturesConfig
from vqrae.eval.geneval.evaluate import GenEvalConfig
from vqrae.eval.geneval.scenes import GenerationConfig as GenerationEvaluation
from vqrae.eval.reconstruction.evaluate import ReconstructionConfig
from vqrae.eval.understanding.evaluate import UnderstandingConfig
from vqrae.generation.config import TrainingConfig, read_config
from vqrae.quickstart.pretrain_encoder import EncoderPretrainingConfig
from vqrae.quickstart.scene_questions import SceneQuestionsConfig
from vqrae.quickstart.train_llm import TinyLLMConfig
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.understanding.train import TrainConfig

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.sh") if path.name != "lib.sh")
TRAININGS = ["pretrain_encoder", "train_tokenizer", "train_llm", "train_llava", "train_ar_gen"]
EVALUATIONS = [
    "eval_reconstruction",
    "eval_features",
    "eval_understanding",
    "eval_geneval",
    "eval_dpg",
]
# What reads the command line of each training module.
READERS: dict[str, Callable[[list[str]], object]] = {
    "vqrae.quickstart.pretrain_encoder": lambda a: load_config(
        EncoderPretrainingConfig, shipped_config("vqrae.quickstart", a[0]), a[1:]
    ),
    "vqrae.tokenizer.train": lambda a: load_config(
        TokenizerTrainConfig, shipped_config("vqrae.tokenizer", a[0]), a[1:]
    ),
    "vqrae.quickstart.train_llm": lambda a: load_config(
        TinyLLMConfig, shipped_config("vqrae.quickstart", a[0]), a[1:]
    ),
    "vqrae.understanding.train": lambda a: load_config(
        TrainConfig, shipped_config("vqrae.understanding", a[0]), a[1:]
    ),
    "vqrae.generation.extract_codes": lambda a: read_config(a, "extraction"),
    "vqrae.generation.train": lambda a: read_config(a, "training"),
    "vqrae.eval.reconstruction.evaluate": lambda a: parse(ReconstructionConfig, a),
    "vqrae.eval.features.evaluate": lambda a: parse(FeaturesConfig, a),
    "vqrae.quickstart.scene_questions": lambda a: parse(SceneQuestionsConfig, a),
    "vqrae.eval.ablations.evaluate": lambda a: parse(AblationConfig, a),
    "vqrae.eval.understanding.evaluate": lambda a: parse(UnderstandingConfig, a),
    "vqrae.eval.geneval.scenes": lambda a: parse(GenerationEvaluation, a),
    "vqrae.eval.geneval.evaluate": lambda a: parse(GenEvalConfig, a),
    "vqrae.eval.dpg_bench.evaluate": lambda a: parse(DPGConfig, a),
}


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


@pytest.mark.parametrize(
    "path",
    [*SCRIPTS, ROOT / "scripts" / "lib.sh", ROOT / ".ci" / "run"],
    ids=lambda path: path.name,
)
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
    "script",
    [
        "pretrain_encoder",
        "train_tokenizer",
        "train_llm",
        "train_llava",
        "extract_codes",
        "train_ar_gen",
    ],
)
def test_a_bare_call_launches_the_embedded_default(script: str, repository: Any) -> None:
    result = repository.run(f"{script}.sh")
    assert result.returncode == 0, result.stderr
    last = repository.calls()[-1]
    assert last[0] == "-m"  # a plain process
    assert read(last)


@pytest.mark.parametrize("script", EVALUATIONS)
def test_an_evaluation_needs_a_model_only(script: str, repository: Any) -> None:
    result = repository.run(f"{script}.sh", "model=m")
    assert result.returncode == 0, result.stderr
    [call] = repository.calls()
    assert read(call)


def test_an_ablation_launches_its_trainings_itself(repository: Any) -> None:
    result = repository.run(
        "ablate.sh", "nproc=3", "overrides=[data.num_workers=2,stage1.max_steps=4]"
    )
    assert result.returncode == 0, result.stderr
    pretraining, call = repository.calls()
    assert pretraining[1] == "vqrae.quickstart.pretrain_encoder"
    assert call[0] == "-m"  # a plain process
    config = AblationConfig(nproc=3, overrides=("data.num_workers=2", "stage1.max_steps=4"))
    assert read(call) == config


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("eval_geneval", ["prompts_only=true", "out=o"]),
        ("eval_geneval", ["images=.", "detector=transformers"]),
        ("eval_geneval", ["model=m", "seed=43"]),
        ("eval_dpg", ["images=.", "images_per_prompt=4"]),
    ],
)
def test_benchmarks_with_their_own_prompts_make_no_model(
    script: str, arguments: list[str], repository: Any
) -> None:
    result = repository.run(f"{script}.sh", *arguments)
    assert result.returncode == 0, result.stderr
    [call] = repository.calls()
    assert read(call)


def test_understanding_goes_through_lmms_eval_when_asked(repository: Any) -> None:
    repository.run("eval_understanding.sh", "model=m", "benchmark=pope,mme", "nproc=2", "limit=5")
    [call] = repository.calls()
    assert "torch.distributed.run" in call
    config = read(call)
    assert isinstance(config, UnderstandingConfig)
    assert (config.names(), config.limit, config.output) == (
        ["pope", "mme"],
        5,
        "runs/evaluation/understanding",
    )
    repository.run("eval_understanding.sh", "model=m", "benchmark=lmms_scenes")
    config = read(repository.calls()[0])
    assert isinstance(config, UnderstandingConfig)
    assert config.names() == ["scenes"]


def test_missing_artefacts_are_made_first(repository: Any) -> None:
    repository.run("train_ar_gen.sh")
    modules = [call[1].removeprefix("vqrae.") for call in repository.calls()]
    assert modules == [
        "quickstart.pretrain_encoder",
        "tokenizer.train",
        "generation.extract_codes",
        "generation.train",
    ]
    assert "tokenizer=runs/tokenizer" in repository.calls()[2]


def test_artefacts_of_the_quickstart_are_found(repository: Any) -> None:
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


def test_processes_nodes_and_zero_choose_the_launch(repository: Any) -> None:
    given = ["tokenizer=t", "llm=l"]
    repository.run("train_llava.sh", "nproc=2", "zero=2", *given)
    [call] = repository.calls()
    assert call[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    config = read(call)
    assert isinstance(config, TrainConfig)
    assert (config.pretrain.zero, config.sft.zero) == (2, 2)
    repository.run(
        "train_llava.sh", "zero=3", *given
    )  # DeepSpeed needs the launcher's variables even for one process
    assert "torch.distributed.run" in repository.calls()[0]
    assert repository.run("train_llava.sh", "nnodes=2", *given).returncode == 2
    repository.run("train_llava.sh", "nnodes=2", *given, MASTER_ADDR="first")
    assert repository.calls()[0][2:8] == [
        "--nnodes",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "first:29500",
    ]
    static = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "first", "--master_port", "3"]
    for rank in ({}, {"SLURM_NODEID": "1"}):
        chosen = [] if rank else ["node_rank=1"]
        repository.run(
            "train_llava.sh",
            "nnodes=2",
            *chosen,
            *given,
            MASTER_ADDR="first",
            MASTER_PORT="3",
            **rank,
        )
        assert repository.calls()[0][2:10] == static


def test_what_is_given_wins_over_the_defaults(repository: Any) -> None:
    for key in ("output", "output_dir"):
        repository.run("train_llm.sh", f"{key}=mine")
        config = read(repository.calls()[0])
        assert isinstance(config, TinyLLMConfig)
        assert config.output_dir == "mine"


@pytest.mark.parametrize("name", ["mine.yaml", "tiny_of_mine.yaml"])
def test_a_configuration_of_ones_own_behaves_like_what_it_was_copied_from(
    name: str, repository: Any
) -> None:
    own = repository.folder / name
    own.write_text((ROOT / "understanding" / "configs" / "tiny.yaml").read_text())
    repository.run("train_llava.sh", f"config={name}")
    modules = [call[1].removeprefix("vqrae.") for call in repository.calls()]
    assert modules == [
        "quickstart.pretrain_encoder",
        "tokenizer.train",
        "quickstart.train_llm",
        "understanding.train",
    ]
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


def test_an_unknown_configuration_is_refused_before_the_launch(repository: Any) -> None:
    result = repository.run("train_tokenizer.sh", "config=tinny")
    assert result.returncode == 2
    assert "Did you mean 'tiny'?" in result.stderr
    assert repository.calls() == []


def test_zero_of_a_key_counts(repository: Any) -> None:
    repository.run("train_llava.sh", "sft.zero=2", "tokenizer=t", "llm=l")
    assert "torch.distributed.run" in repository.calls()[0]


def test_full_size_configurations_hold_their_own_defaults(repository: Any) -> None:
    repository.run("train_ar_gen.sh", "config=qwen3_0_6b")
    [call] = repository.calls()
    assert call[-2:] == ["vqrae.generation.train", "qwen3_0_6b"]
    assert "torch.distributed.run" in call


@pytest.mark.parametrize("config", ["smollm2", "vicuna_7b", "vicuna_13b", "qwen2_5_7b"])
def test_language_models_of_llava(config: str, repository: Any) -> None:
    result = repository.run(
        "train_llava.sh", f"config={config}", "tokenizer=t", "stage=sft", "lora={}"
    )
    assert result.returncode == 0, result.stderr
    *before, call = repository.calls()
    assert ("torch.distributed.run" in call) == (config != "smollm2")
    assert [c[1:] for c in before] == (
        [["vqrae.understanding.smollm2", "runs/smollm2"]] if config == "smollm2" else []
    )
    trained = read(call)
    assert isinstance(trained, TrainConfig)
    assert trained.output_dir.endswith(config)
    assert trained.lora is not None
    assert trained.lora.rank == 128


def test_a_dry_run_of_a_published_variant(repository: Any) -> None:
    repository.run(
        "train_tokenizer.sh", "config=siglip2_256", "stage=2", "dry_run=1", "micro_batch_size=2"
    )
    [call] = repository.calls()
    config = read(call)
    assert isinstance(config, TokenizerTrainConfig)
    assert (config.dry_run, config.stage, config.stage_config(2).micro_batch_size) == (1, 2, 2)


def test_a_dry_run_of_the_generator_makes_no_artefacts(repository: Any) -> None:
    for config in ("qwen3_0_6b", "tiny"):
        repository.run("train_ar_gen.sh", f"config={config}", "dry_run=1")
        [call] = repository.calls()
        settings = read(call)
        assert isinstance(settings, TrainingConfig)
        assert settings.dry_run == 1


@pytest.mark.parametrize("script", TRAININGS)
def test_zero_reaches_every_training(script: str, repository: Any) -> None:
    repository.run(f"{script}.sh", "zero=1", "tokenizer=t", "llm=l", "encoder=e", "data=d")
    [call] = repository.calls()
    assert any(word.endswith("zero=1") for word in call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "expected key=value"),
        (["zero=4"], "zero must be"),
        (["nproc=0"], "nproc and nnodes"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(
    arguments: list[str], message: str, repository: Any
) -> None:
    result = repository.run("train_tokenizer.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert repository.calls("") == []
