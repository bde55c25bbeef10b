"""Questions about validation scenes as an lmms-eval task over a local parquet file.

python -m vqrae.eval.understanding.lmms_tasks.scenes output=runs/tasks
python -m lmms_eval --model vqrae --model_args pretrained=runs/understanding --include_path runs/tasks --tasks vqrae_scenes
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from vqrae.common.cli import parse
from vqrae.common.errors import run_main
from vqrae.common.files import atomic_path, write_text
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.sprites import load_sprites

TASK = "vqrae_scenes"


@dataclass(frozen=True, kw_only=True)
class SceneTaskConfig:
    """Write questions about validation scenes as a task for lmms-eval: FOLDER/scenes.parquet and FOLDER/vqrae_scenes.yaml."""

    output: str
    """Folder; give it to lmms-eval as --include_path."""
    num_images: int = 500
    """Scenes to ask about; each gets up to five questions."""
    sprites: str = "shapes"
    """What the scenes are made of: shapes or emoji."""
    image_size: int = 64
    """Pixels of a scene's side; the model's processor scales them."""
    seed: int = 0
    """Of the scenes; that of the training data."""

    def __post_init__(self) -> None:
        load_sprites(self.sprites)
        if self.num_images < 1:
            raise ValueError(f"num_images: got {self.num_images}, expected at least 1")


def write_task(config: SceneTaskConfig) -> Path:
    """Write parquet and task file; returns the folder."""
    folder = Path(config.output)
    features = Features(
        {
            "image": ImageFeature(),
            "question": Value("string"),
            "answer": Value("string"),
            "kind": Value("string"),
            "held_out": Value("bool"),
        }
    )
    rows = Dataset.from_list(list(_rows(config)), features=features)
    with atomic_path(folder / "scenes.parquet") as temporary:
        rows.to_parquet(temporary)
    base = resources.files("vqrae.eval.understanding") / "lmms_tasks" / "scenes.yaml"
    write_text(
        folder / f"{TASK}.yaml",
        f"include: {base}\ntask: {TASK}\noutput_type: generate_until\n"
        "dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: scenes.parquet\n",
    )
    return folder


def _rows(config: SceneTaskConfig) -> Iterator[dict[str, Any]]:
    scenes = SceneDataset(
        "validation",
        config.num_images,
        image_size=config.image_size,
        sprites=config.sprites,
        seed=config.seed,
    )
    for index in range(config.num_images):
        stream = io.BytesIO()
        Image.fromarray(scenes.pixels(index)).save(stream, format="PNG")
        for question in scenes.questions(index):
            yield {
                "image": {"bytes": stream.getvalue(), "path": f"{index}.png"},
                "question": question.text,
                "answer": question.answer,
                "kind": question.kind,
                "held_out": index % 2 == 1,
            }


# ---- what the task file names


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of a question."""
    return [doc["image"].convert("RGB")]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float | None]:
    """1 or 0 for an answer; `held_out` and `seen` are None for questions of the other half."""
    right = float(results[0].strip().lower() == doc["answer"].strip().lower())
    return {
        "accuracy": right,
        "held_out": right if doc["held_out"] else None,
        "seen": None if doc["held_out"] else right,
    }


def mean_of_known(values: Sequence[float | None]) -> float:
    """Mean of what is not None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def main(argv: list[str] | None = None) -> None:
    folder = write_task(parse(SceneTaskConfig, argv))
    print(f"task {TASK} is in {folder}: give it to lmms-eval as --include_path {folder}")


if __name__ == "__main__":
    run_main(main)
