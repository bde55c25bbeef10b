"""The paper's understanding benchmarks as lmms-eval tasks, and the paper's own scores."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Image, load_dataset

from vqrae.common.files import write_text
from vqrae.eval.results.evaluate import paper_tables

FOLDER_VARIABLE = "VQRAE_BENCHMARKS"  # the folder of local data, for the functions of task files
GQA_IMAGES = "gqa/testdev_balanced_images/*.parquet"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One column of the table."""

    column: str
    """Heading."""
    paper: str
    """The paper's name of it; it does not say which of the two TextVQA columns it has."""
    source: str
    """Task file below `lmms_eval/tasks`."""
    task: str
    """Name of the task in lmms-eval."""
    split: str
    metric: str
    """Key of the score in lmms-eval's results."""
    scale: float = 100.0
    """Factor that gives the paper's unit."""
    files: str
    """Parquet files below the folder of local data."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What differs from lmms-eval's task file."""
    process_docs: str | None = None
    """Function that the task file names over local data."""


_TABLE = resources.files("vqrae.eval.understanding") / "benchmarks.yaml"
BENCHMARKS = {
    name: Benchmark(**values)
    for name, values in yaml.safe_load(_TABLE.read_text(encoding="utf-8")).items()
}

# Model type of the encoder, pixels, width of the language model -> how the paper's table names
# them.
_PAPER_MODELS = {
    ("siglip_vision_model", 256, 4096): ("SigLIP2", "V-7B", 256),
    ("siglip_vision_model", 256, 5120): ("SigLIP2", "V-13B", 256),
    ("siglip_vision_model", 512, 4096): ("SigLIP2", "V-7B", 512),
    ("siglip_vision_model", 512, 5120): ("SigLIP2", "V-13B", 512),
    ("internvl_vision", 448, 3584): ("InternViT-300M", "Qwen2.5-7B", 448),
}


def paper_row(model_config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The paper's row for a model, by the encoder, resolution and LLM width in its `config.json`.

    Returns its name and its scores by the paper's names of the benchmarks; for a model that the
    paper does not have, the row of SigLIP2-512 and Vicuna-7B under a name that says so.
    """
    vision, text = model_config.get("vision_config", {}), model_config.get("text_config", {})
    size = vision.get("image_size")
    size = size[0] if isinstance(size, list) else size
    known = _PAPER_MODELS.get((vision.get("model_type"), size, text.get("hidden_size")))
    encoder, llm, pixels = known or ("SigLIP2", "V-7B", 512)
    table = paper_tables()["understanding"]
    ours = [row for row in table.rows if str(row[0]).startswith("VQRAE")]
    [row] = [row for row in ours if row[1:4] == [encoder, llm, pixels]]
    name = f"paper, {encoder}-{pixels}, {llm.replace('V-', 'Vicuna-')}"
    scores = dict(zip(list(table.columns)[3:], row[4:], strict=True))
    return name if known else f"{name} (another model)", scores


def task_name(name: str, data: Path | None) -> str:
    """Name in lmms-eval of a benchmark over `data`: its own, or that of the file written here."""
    benchmark = BENCHMARKS[name]
    return benchmark.task if data is None and not benchmark.changes else f"vqrae_{name}"


def write_task_file(name: str, folder: Path, data: Path | None) -> None:
    """Write the lmms-eval task file of a benchmark that lmms-eval's own does not fit.

    lmms-eval gets `folder` as `--include_path`; `data` is a folder of local parquet files
    (`NAME/…`), None for the hub or its cache. Raises FileNotFoundError when the local files are not
    there.
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
    if data is not None:
        files = sorted(str(path.resolve()) for path in data.glob(benchmark.files))
        if not files:
            raise FileNotFoundError(f"{data} holds no {benchmark.files}, which {name} reads")
        sources = {"data_files": {benchmark.split: files}}
        values |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": sources}
    text = yaml.safe_dump(values, sort_keys=False)
    if data is not None and benchmark.process_docs:
        function = f"process_docs: !function {benchmark.process_docs}\n"
        text = f"# Needs {FOLDER_VARIABLE}={data}\n{text}{function}"
    write_text(folder / f"{task}.yaml", text)


def join_local_images(questions: Dataset) -> Dataset:
    """GQA's questions with their images, from `$VQRAE_BENCHMARKS`.

    lmms-eval's own task fetches the images from the hub, whatever its data set is set to.
    """
    folder = Path(os.environ[FOLDER_VARIABLE])
    files = sorted(str(path) for path in folder.glob(GQA_IMAGES))
    if not files:
        raise ValueError(
            f"{folder} holds no {GQA_IMAGES}: GQA keeps its images in files of their own"
        )
    images = load_dataset("parquet", data_files=files, split="train")
    feature = images.features["image"]
    # Decoded images would be encoded again, as JPEG.
    images = images.cast_column("image", Image(decode=False))
    rows = {identity: row for row, identity in enumerate(images["id"])}

    def with_image(question: dict[str, Any]) -> dict[str, Any]:
        return {"image": images[rows[question["imageId"]]]["image"]}

    return questions.map(with_image).cast_column("image", feature)
