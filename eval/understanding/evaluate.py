"""Understanding benchmarks through lmms-eval: scores with their manifests, below the paper's row.

    python -m vqrae.eval.understanding.evaluate model=runs/vicuna_7b data=benchmarks output=OUT
    torchrun --nproc_per_node 8 -m vqrae.eval.understanding.evaluate benchmark=pope,gqa …

Every benchmark leaves `NAME.json` (score, all of lmms-eval's results, manifest) and
`NAME.samples.jsonl` as soon as it is done; the same command continues with those that are missing.
lmms-eval runs inside this process, so that what fails there fails here: its own command line ends
with exit code 0 whatever happened."""

import importlib.metadata
import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.checkpoints import local_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range, did_you_mean
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import require_package, run_main
from vqrae.common.files import (
    markdown_table,
    read_json,
    weights_fingerprint,
    write_json,
    write_text,
)
from vqrae.common.run import hold_folder, kept, quiet_libraries, run_manifest
from vqrae.eval.understanding.benchmarks import (
    BENCHMARKS,
    FOLDER_VARIABLE,
    paper_row,
    task_name,
    write_task_file,
)

TOKENIZER_KEY = "vqrae_tokenizer_fingerprint"


@dataclass(frozen=True, kw_only=True)
class UnderstandingConfig:
    """Score an understanding model with lmms-eval on the paper's eight benchmarks."""

    model: str
    """Understanding model: run directory, model folder or hub id."""
    output: str
    """Folder of the scores; the same command continues where it ended."""
    benchmark: str = "paper"
    """paper (all eight, TextVQA with and without OCR tokens), or names joined by commas."""
    data: str | None = None
    """Folder of local parquet files (docs/understanding.md); None: the hub, or its cache."""
    limit: int | None = None
    """Questions of each benchmark; None: all. For a trial only: such a score is not a score."""
    batch_size: int = 16
    """Questions of one pass on one process; answers do not depend on it."""
    dtype: str = "auto"
    """Of the weights: float32, bfloat16, …; auto is that of the folder."""
    device: str | None = None
    """cpu, cuda, …; None takes CUDA when there is one."""

    def __post_init__(self) -> None:
        self.names()
        check_range(self, "batch_size", "limit", low=1)

    def names(self) -> list[str]:
        """The benchmarks, in order."""
        names = list(BENCHMARKS) if self.benchmark == "paper" else self.benchmark.split(",")
        for name in names:
            if name not in BENCHMARKS:
                hint = did_you_mean(name, ("paper", *BENCHMARKS))
                raise ValueError(f"unknown benchmark {name!r}. {hint}")
        return names


def evaluate(config: UnderstandingConfig, model_config: dict[str, Any]) -> dict[str, Any]:
    """The content of `NAME.json` by benchmark, on the main process; what is missing is run.

    Raises ValueError when a benchmark was run with other settings, or gives no score.
    """
    output, data = Path(config.output), Path(config.data) if config.data else None
    settings: dict[str, Any] = {  # what decides a score
        "model": weights_fingerprint(local_model(config.model)),
        "limit": config.limit,
        "dtype": config.dtype,
        "lmms_eval": importlib.metadata.version("lmms-eval"),
        "data": config.data,
    }
    if TOKENIZER_KEY in model_config:
        settings["tokenizer"] = model_config[TOKENIZER_KEY]
    files = {name: output / f"{name}.json" for name in config.names()}
    missing = [name for name, file in files.items() if not file.is_file()]
    found = {}
    for name in files.keys() - set(missing):
        found[name] = kept(files[name], settings, dict)  # refuses other settings before the work
    if missing:
        if data is not None:
            os.environ[FOLDER_VARIABLE] = str(data)
        if is_main_process():  # before the model is loaded: missing files should fail now
            for name in missing:
                write_task_file(name, output / "tasks", data)

        from vqrae.eval.understanding.lmms_eval_model import LMMSEvalModel  # needs lmms-eval

        model = LMMSEvalModel(
            config.model, batch_size=config.batch_size, device=config.device, dtype=config.dtype
        )
        model.accelerator.wait_for_everyone()  # for the task files
        for name in missing:
            task = task_name(name, data)

            def make(name: str = name, task: str = task) -> dict[str, Any]:
                return run_task(model, name, task, output, config.limit, settings)

            found[name] = kept(files[name], settings, make)
    return {name: found[name] for name in files}


def run_task(
    model: Any, name: str, task: str, output: Path, limit: int | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Run a task of lmms-eval on all processes; its score on the main process, {} on the others."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    if is_main_process():
        print(f"{name}: task {task} of lmms-eval", flush=True)
    own = task.startswith("vqrae_")
    results = evaluator.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager("WARNING", str(output / "tasks"), include_defaults=not own),
        limit=limit,
        # What the scorers of some tasks read of the command line: where submission files go.
        cli_args=Namespace(output_path=str(output / "lmms_eval"), process_with_media=False),
    )
    if not is_main_process():
        return {}
    benchmark = BENCHMARKS[name]
    score = find_score(name, task, results)
    samples = results["samples"][task]
    lines = [json.dumps(sample, default=str) + "\n" for sample in samples]
    write_text(output / f"{name}.samples.jsonl", "".join(lines))
    identities: dict[str, str] = {
        key: settings[key] for key in ("model", "tokenizer") if key in settings
    }
    value = {
        "score": benchmark.scale * score,
        "num_samples": len(samples),
        "manifest": run_manifest(fingerprints=identities),
        "results": results["results"][task],
        "task": {"name": task, **results["configs"][task]},
    }
    return json.loads(json.dumps(value, default=str))  # configurations hold functions


def find_score(name: str, task: str, results: Mapping[str, Any] | None) -> float:
    """The score of a benchmark in lmms-eval's results; ValueError when missing or not finite."""
    metric = BENCHMARKS[name].metric
    scores = ((results or {}).get("results") or {}).get(task) or {}
    score = scores.get(metric)
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(
            f"{name}: the benchmark failed, lmms-eval gave no {metric} of task {task}: {scores}"
        )
    return score


def benchmark_table(
    found: Mapping[str, Mapping[str, Any]], model_config: Mapping[str, Any], limit: int | None
) -> str:
    """The paper's row and ours."""
    title, paper = paper_row(model_config)
    header, theirs = [""], [title]
    ours = ["ours"]
    for name, value in found.items():
        score = paper[BENCHMARKS[name].paper]
        header.append(BENCHMARKS[name].column)
        theirs.append("-" if score is None else f"{score:.1f}")
        ours.append(f"{value['score']:.1f}")
    lines = ["# Understanding", "", *markdown_table(header, [theirs, ours]), ""]
    if "textvqa" in found or "textvqa_ocr" in found:
        lines += ["The paper does not say whether its TextVQA prompts held OCR tokens.", ""]
    if limit is not None:
        lines += [f"At most {limit} questions of each benchmark: a trial, not a score.", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config = parse(UnderstandingConfig, argv)
    require_package("lmms_eval", "benchmark=")
    quiet_libraries()
    output = Path(config.output)
    hold_folder(output)
    model_config = read_json(local_model(config.model) / "config.json")
    found = evaluate(config, model_config)
    if is_main_process():
        text = benchmark_table(found, model_config, config.limit)
        write_json(output / "scores.json", {name: value["score"] for name, value in found.items()})
        write_text(output / "scores.md", text)
        print(f"{text}->  {output}")


if __name__ == "__main__":
    run_main(main)
