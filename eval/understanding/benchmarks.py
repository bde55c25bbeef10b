"""The eight understanding benchmarks of the paper as lmms-eval tasks, and what the paper reports (2511.23386, Table 3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vqrae.common.files import write_text
from vqrae.eval.results.evaluate import paper_tables
from vqrae.eval.understanding.lmms_tasks.gqa import FOLDER_VARIABLE


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One column of the table.

    Attributes:
        column: heading.
        paper: the paper's name of it; the two TextVQA columns share one, for the paper does not say which of them it is.
        source: task file below `lmms_eval/tasks`.
        task: name of the task in lmms-eval.
        metric: key of the score in lmms-eval's results.
        scale: factor that gives the paper's unit.
        files: parquet files of the benchmark, below the folder of local data.
        split: the task's split.
        changes: what differs from lmms-eval's task file.
        local: further lines of the task file over local data.
    """

    column: str
    paper: str
    source: str
    task: str
    metric: str
    scale: float = 100.0
    files: str
    split: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    local: str = ""


_ocr = {
    "pre_prompt": "",
    "post_prompt": "\nAnswer the question using a single word or phrase.",
    "ocr": True,
}
BENCHMARKS = {
    "pope": Benchmark(
        column="POPE (F1)",
        paper="POPE",
        source="pope/pope.yaml",
        task="pope",
        metric="pope_f1_score,none",
        files="pope/**/test*.parquet",
        split="test",
    ),
    "gqa": Benchmark(
        column="GQA",
        paper="GQA",
        source="gqa/gqa.yaml",
        task="gqa",
        metric="exact_match,none",
        files="gqa/testdev_balanced_instructions/*.parquet",
        split="testdev",
        local="process_docs: !function vqrae.eval.understanding.lmms_tasks.gqa.join_local_images\n",
    ),
    "textvqa": Benchmark(
        column="TextVQA (no OCR tokens)",
        paper="TQA",
        source="textvqa/textvqa_val.yaml",
        task="textvqa_val",
        metric="exact_match,none",
        files="textvqa/**/validation*.parquet",
        split="validation",
    ),
    "textvqa_ocr": Benchmark(
        column="TextVQA (OCR tokens)",
        paper="TQA",
        source="textvqa/textvqa_val.yaml",
        task="textvqa_val",
        metric="exact_match,none",
        files="textvqa/**/validation*.parquet",
        split="validation",
        changes={"lmms_eval_specific_kwargs": {"default": _ocr}},
    ),
    "mmbench": Benchmark(
        column="MMBench-en (dev, matched)",  # by rules instead of a GPT judge
        paper="MMB",
        source="mmbench/mmbench_en_dev_static.yaml",
        task="mmbench_en_dev_static",
        metric="gpt_eval_score,none",
        scale=1.0,
        files="mmbench/en/dev*.parquet",  # its neighbours cn and cc hold the same questions in Chinese
        split="dev",
    ),
    "mme": Benchmark(
        column="MME-Perception",
        paper="MME-P",
        source="mme/mme.yaml",
        task="mme",
        metric="mme_perception_score,none",
        scale=1.0,
        files="mme/**/test*.parquet",
        split="test",
    ),
    "seedbench": Benchmark(
        column="SEED-Image",
        paper="SEED",
        source="seedbench/seedbench.yaml",
        task="seedbench",
        metric="seed_image,none",
        files="seedbench/**/test*.parquet",
        split="test",
    ),
    "mmmu": Benchmark(
        column="MMMU (val)",
        paper="MMMU",
        source="mmmu/mmmu_val.yaml",
        task="mmmu_val",
        metric="mmmu_acc,none",
        files="mmmu/**/validation*.parquet",
        split="validation",
    ),
    "ai2d": Benchmark(
        column="AI2D",
        paper="AI2D",
        source="ai2d/ai2d.yaml",
        task="ai2d",
        metric="exact_match,flexible-extract",
        files="ai2d/**/test*.parquet",
        split="test",
    ),
}

# Model type of the encoder, pixels, width of the language model -> how the paper's table calls the three.
_PAPER_MODELS = {
    ("siglip_vision_model", 256, 4096): ("SigLIP2", "V-7B", 256),
    ("siglip_vision_model", 256, 5120): ("SigLIP2", "V-13B", 256),
    ("siglip_vision_model", 512, 4096): ("SigLIP2", "V-7B", 512),
    ("siglip_vision_model", 512, 5120): ("SigLIP2", "V-13B", 512),
    ("internvl_vision", 448, 3584): ("InternViT-300M", "Qwen2.5-7B", 448),
}


def paper_row(model_config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The paper's row for a model, by its encoder, resolution and width of the language model.

    Args:
        model_config: `config.json` of a LLaVA or InternVL folder.

    Returns:
        Its name and its scores by the paper's names of the benchmarks; for a model that the paper does not have, the row of
        SigLIP2-512 and Vicuna-7B under a name that says so.
    """
    vision, text = model_config.get("vision_config", {}), model_config.get("text_config", {})
    size = vision.get("image_size")
    key = (
        vision.get("model_type"),
        size[0] if isinstance(size, list) else size,
        text.get("hidden_size"),
    )
    wanted = _PAPER_MODELS.get(key, ("SigLIP2", "V-7B", 512))
    table = paper_tables()["understanding"]
    ours = [row for row in table.rows if str(row[0]).startswith("VQRAE")]
    [row] = [row for row in ours if row[1:4] == list(wanted)]
    encoder, llm, pixels = wanted
    name = f"paper, {encoder}-{pixels}, {llm.replace('V-', 'Vicuna-')}{'' if key in _PAPER_MODELS else ' (another model)'}"
    return name, dict(zip(list(table.columns)[3:], row[4:], strict=True))


def task_name(name: str, data: Path | None) -> str:
    """Name in lmms-eval of a benchmark over `data`: its own where its own task file does."""
    benchmark = BENCHMARKS[name]
    return benchmark.task if data is None and not benchmark.changes else f"vqrae_{name}"


def write_task_file(name: str, folder: Path, data: Path | None) -> None:
    """Write the lmms-eval task file of a benchmark where lmms-eval's own does not do.

    Args:
        name: key of `BENCHMARKS`.
        folder: for task files, to be given to lmms-eval as `--include_path`.
        data: folder of local parquet files (`NAME/…`), None for lmms-eval's own source, the hub or its cache.

    Raises:
        FileNotFoundError: naming the pattern, when the local files are not there.
    """
    benchmark, task = BENCHMARKS[name], task_name(name, data)
    if task == benchmark.task:
        return
    values: dict[str, Any] = {
        "include": str(Path(str(resources.files("lmms_eval"))) / "tasks" / benchmark.source),
        "task": task,
        "output_type": "generate_until",  # lmms-eval's index looks for it here
        **benchmark.changes,
    }
    text = ""
    if data is not None:
        files = sorted(str(path.resolve()) for path in data.glob(benchmark.files))
        if not files:
            raise FileNotFoundError(
                f"{data} holds no {benchmark.files}, which benchmark {name} reads"
            )
        values |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {benchmark.split: files}},
        }
        text = benchmark.local
    header = f"# Needs {FOLDER_VARIABLE}={data}\n" if FOLDER_VARIABLE in text else ""
    write_text(folder / f"{task}.yaml", header + yaml.safe_dump(values, sort_keys=False) + text)
