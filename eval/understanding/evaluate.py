"""Understanding benchmarks through lmms-eval: each score with its manifest, and the paper's row beside ours.

    python -m vqrae.eval.understanding.evaluate model=runs/understanding benchmark=scenes output=runs/evaluation/understanding
    python -m vqrae.eval.understanding.evaluate model=runs/vicuna_7b benchmark=paper data=benchmarks output=… batch_size=16
    torchrun --nproc_per_node 8 -m vqrae.eval.understanding.evaluate model=runs/vicuna_7b benchmark=pope,gqa output=…

Every benchmark leaves `NAME.json` (score, all of lmms-eval's results, manifest) and `NAME.samples.jsonl` as soon as it is
done; the same command goes on with those that are missing. lmms-eval runs inside this process, so that what fails there fails
here: its own command line ends with exit code 0 whatever happened.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqrae.common.checkpoints import local_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range, did_you_mean
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import require_package, run_main
from vqrae.common.files import read_json, weights_fingerprint, write_json, write_text
from vqrae.common.run import hold, quiet_libraries, run_manifest
from vqrae.eval.tables import markdown_table
from vqrae.eval.understanding.benchmarks import BENCHMARKS, paper_row, task_name, write_task_file
from vqrae.eval.understanding.lmms_tasks.gqa import FOLDER_VARIABLE
from vqrae.eval.understanding.lmms_tasks.scenes import TASK, SceneTaskConfig, write_task

if TYPE_CHECKING:
    from vqrae.eval.understanding.lmms_eval_model import LMMSEvalModel

SCENES = "scenes"
TOKENIZER_KEY = "vqrae_tokenizer_fingerprint"


@dataclass(frozen=True, kw_only=True)
class UnderstandingConfig:
    """Score an understanding model with lmms-eval on scenes, or on the paper's eight benchmarks."""

    model: str
    """Understanding model: run directory, model folder or hub id."""
    output: str
    """Folder of the scores; the same command goes on where it ended."""
    benchmark: str = SCENES
    """scenes, paper (all eight, TextVQA with and without OCR tokens), or names joined by commas."""
    data: str | None = None
    """Folder of local parquet files, NAME/… for each benchmark (docs/understanding.md); None: the hub, or its cache."""
    limit: int | None = None
    """Questions of each benchmark; None: all. For trying out only: such a score is no score."""
    batch_size: int = 16
    """Questions of one pass on one process; answers do not depend on it."""
    num_images: int = 500
    """Scenes to ask about."""
    sprites: str = "shapes"
    """What the scenes are made of: shapes or emoji."""
    dtype: str = "auto"
    """Of the weights: float32, bfloat16, …; auto is that of the folder."""
    device: str | None = None
    """cpu, cuda, …; None takes CUDA when there is one."""

    def __post_init__(self) -> None:
        self.names()
        check_range(self, "batch_size", "num_images", "limit", low=1)

    def names(self) -> list[str]:
        """The benchmarks, in order."""
        names = list(BENCHMARKS) if self.benchmark == "paper" else self.benchmark.split(",")
        for name in names:
            if name not in (SCENES, *BENCHMARKS):
                raise ValueError(
                    f"unknown benchmark {name!r}. {did_you_mean(name, (SCENES, 'paper', *BENCHMARKS))}"
                )
        return names


def evaluate(config: UnderstandingConfig) -> dict[str, dict[str, Any]]:
    """Run what has no score yet; returns the content of `NAME.json` by benchmark (on the main process).

    Raises:
        ValueError: when lmms-eval returns without a score.
    """
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    output, folder = Path(config.output), local_model(config.model)
    model_config = read_json(folder / "config.json")
    identities = {"model": weights_fingerprint(folder)}
    if TOKENIZER_KEY in model_config:
        identities["tokenizer"] = model_config[TOKENIZER_KEY]
    data = Path(config.data) if config.data else None
    if data is not None:
        os.environ[FOLDER_VARIABLE] = str(data)
    settings = {name: _settings(config, name, identities) for name in config.names()}
    done = {
        name: read_json(output / f"{name}.json")
        for name in settings
        if (output / f"{name}.json").is_file()
    }
    found = {name: value for name, value in done.items() if value["settings"] == settings[name]}
    missing = [name for name in settings if name not in found]
    tasks = output / "tasks"
    if is_main_process():  # before the model is loaded: what is not there should fail now
        for name in missing:
            _write_task(config, name, tasks, data)
    model = _load(config) if missing else None
    for name in missing:
        task = TASK if name == SCENES else task_name(name, data)
        if is_main_process():
            print(f"{name}: task {task} of lmms-eval", flush=True)
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=TaskManager(
                "WARNING", str(tasks), include_defaults=not task.startswith("vqrae_")
            ),
            limit=config.limit,
            # What the scorers of some tasks read of the command line: where submission files go.
            cli_args=Namespace(output_path=str(output / "lmms_eval"), process_with_media=False),
        )
        if is_main_process():
            found[name] = _store(output / f"{name}.json", name, task, results, settings[name])
    return {name: found[name] for name in settings if name in found}


def _load(config: UnderstandingConfig) -> "LMMSEvalModel":
    from vqrae.eval.understanding.lmms_eval_model import LMMSEvalModel  # needs lmms-eval

    model = LMMSEvalModel(
        config.model, batch_size=config.batch_size, device=config.device, dtype=config.dtype
    )
    model.accelerator.wait_for_everyone()  # for the task files
    return model


def _settings(config: UnderstandingConfig, name: str, identities: dict[str, str]) -> dict[str, Any]:
    """What decides a score: when it is unchanged, so is the score."""
    scenes = (
        {"num_images": config.num_images, "sprites": config.sprites}
        if name == SCENES
        else {"data": config.data}
    )
    version = importlib.metadata.version("lmms-eval")
    return {
        **identities,
        "limit": config.limit,
        "dtype": config.dtype,
        "lmms_eval": version,
        **scenes,
    }


def _write_task(config: UnderstandingConfig, name: str, tasks: Path, data: Path | None) -> None:
    if name == SCENES:
        write_task(
            SceneTaskConfig(output=str(tasks), num_images=config.num_images, sprites=config.sprites)
        )
    else:
        write_task_file(name, tasks, data)


def _store(
    file: Path, name: str, task: str, results: Mapping[str, Any] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write the result of a benchmark, or refuse one without a score."""
    metric, scale = (
        ("accuracy,none", 100.0)
        if name == SCENES
        else (BENCHMARKS[name].metric, BENCHMARKS[name].scale)
    )
    scores = ((results or {}).get("results") or {}).get(task) or {}
    score = scores.get(metric)
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(
            f"{name}: lmms-eval gave no {metric} of task {task}, only {scores}: the benchmark has failed"
        )
    assert results is not None
    samples = results["samples"][task]
    write_text(
        file.with_name(f"{name}.samples.jsonl"),
        "".join(json.dumps(s, default=str) + "\n" for s in samples),
    )
    identities = {key: str(settings[key]) for key in settings if key in ("model", "tokenizer")}
    value = {
        "score": scale * score,
        "num_samples": len(samples),
        "settings": settings,
        "manifest": run_manifest(fingerprints=identities),
        "results": scores,
        "task": {"name": task, **results["configs"][task]},
    }
    write_json(file, value)
    return read_json(file)


def markdown(
    found: Mapping[str, Mapping[str, Any]], model_config: Mapping[str, Any], limit: int | None
) -> str:
    """The paper's row and ours; scenes, which the paper does not have, below."""
    names = [name for name in found if name in BENCHMARKS]
    lines = ["# Understanding", ""]
    if names:
        title, paper = paper_row(model_config)
        theirs = [paper[BENCHMARKS[name].paper] for name in names]
        rows = [
            [title, *("-" if value is None else f"{value:.1f}" for value in theirs)],
            ["ours", *(f"{found[name]['score']:.1f}" for name in names)],
        ]
        lines += [*markdown_table(["", *(BENCHMARKS[name].column for name in names)], rows), ""]
        if "textvqa" in names or "textvqa_ocr" in names:
            lines += ["The paper does not say whether its TextVQA prompts held OCR tokens.", ""]
    if SCENES in found:
        results = found[SCENES]["results"]
        halves = ", ".join(
            f"{key} {100 * results[f'{key},none']:.1f}%" for key in ("seen", "held_out")
        )
        lines += [
            f"Scenes: {found[SCENES]['score']:.1f}% of {found[SCENES]['num_samples']} questions ({halves}).",
            "",
        ]
    if limit is not None:
        lines += [f"At most {limit} questions of each benchmark: a trial, not a score.", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config = parse(UnderstandingConfig, argv)
    require_package("lmms_eval", "benchmark=")
    quiet_libraries()
    if is_main_process():
        Path(config.output).mkdir(parents=True, exist_ok=True)
        hold(Path(config.output) / ".lock", config.output)
    found = evaluate(config)
    if not is_main_process():
        return
    output = Path(config.output)
    text = markdown(found, read_json(local_model(config.model) / "config.json"), config.limit)
    write_json(output / "scores.json", {name: value["score"] for name, value in found.items()})
    write_text(output / "scores.md", text)
    print(f"{text}->  {output}")


if __name__ == "__main__":
    run_main(main)
