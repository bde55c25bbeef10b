"""Does the generator draw what it is asked for? GenEval's six families of prompts over scenes, by GenEval's rules.

    python -m vqrae.eval.geneval.scenes model=runs/generation output=generation.json images=images

Beside the generator's scores stand two ceilings, found by the same detector on scenes that satisfy the same prompts: the
`truth` (what the detector itself loses) and their `reconstruction` (what the codes lose). Images lie in GenEval's folder
layout, so that other scorers can read them; an interrupted run keeps the images it has.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from vqrae.common.cli import parse
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import write_json
from vqrae.common.images import image_to_tensor, tensor_to_image
from vqrae.data.scenes.language import benchmark_prompts, relation
from vqrae.data.scenes.scene import (
    COLOR_NAMES,
    Scene,
    SceneSampler,
    is_held_out_pair,
    is_held_out_triple,
    render,
)
from vqrae.data.scenes.sprites import SpriteSet, load_sprites
from vqrae.eval.drawing import claim_folder, draw_missing
from vqrae.eval.geneval import (
    evaluate_image,
    image_orders,
    require_sight,
    score_folder,
    summarize,
    write_prompts,
    write_rows,
)
from vqrae.eval.geneval.scene_detector import SceneColorClassifier, SceneDetector
from vqrae.eval.manifest import model_fingerprint, score_manifest, tokenizer_fingerprint
from vqrae.eval.sharding import gather_strided, processes, progress_of_main, stride
from vqrae.generation.generator import Generator
from vqrae.generation.sampling import SamplingConfig
from vqrae.tokenizer.modeling import VQRAEModel

COMPOSING = (
    "colors",
    "position",
    "color_attr",
)  # the families whose prompts can hold combinations unseen in training
Progress = Callable[[int, int], None]
BATCH = 64  # images that a tokenizer copies, and that a process scores, at once


# ---- scenes that satisfy a prompt


def satisfying_scene(
    record: dict[str, Any], sampler: SceneSampler, rng: np.random.Generator
) -> Scene:
    """A scene that holds exactly what a prompt asks for; everything else is distributed as in the data set.

    Layouts are drawn until one has as many objects and the relation; then the prompt's names and colours are put on them.
    """
    names, wanted = sampler.sprites.names, []
    for clause in record["include"]:
        color = COLOR_NAMES.index(clause["color"]) if "color" in clause else None
        wanted += [(names.index(clause["class"]), color)] * clause["count"]
    where = [clause["position"][0] for clause in record["include"] if "position" in clause]
    is_group = len(wanted) > 1 and len({name for name, _ in wanted}) == 1
    while True:
        scene = sampler.sample(rng, held_out=None)
        if len(scene.objects) != len(wanted) or is_group != (
            len(wanted) > 1 and len({o.name for o in scene.objects}) == 1
        ):
            continue
        objects = tuple(
            dataclasses.replace(item, name=name, color=item.color if color is None else color)
            for item, (name, color) in zip(scene.objects, wanted, strict=True)
        )
        if not where or relation(objects[1], objects[0]) == where[0]:
            return Scene(objects, scene.background)


def satisfying_images(
    records: Sequence[dict[str, Any]],
    sprites: SpriteSet,
    *,
    image_size: int,
    per_prompt: int,
    seed: int = 0,
) -> list[tuple[Image.Image, dict[str, Any]]]:
    """`per_prompt` rendered scenes for each prompt, with the prompt's record."""
    sampler = SceneSampler(sprites, image_size)
    images = []
    for i, record in enumerate(records):
        for sample in range(per_prompt):
            scene = satisfying_scene(record, sampler, np.random.default_rng([seed, i, sample]))
            images.append((Image.fromarray(render(scene, sprites, image_size)), record))
    return images


@torch.inference_mode()
def reconstruct(pil_images: Sequence[Image.Image], tokenizer: VQRAEModel) -> list[Image.Image]:
    """A batch of images through the tokenizer and back."""
    images = torch.stack([image_to_tensor(image) for image in pil_images]).to(tokenizer.device)
    return [tensor_to_image(image) for image in tokenizer.decode(tokenizer.encode(images))]


# ---- scores


def holds_held_out(record: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a prompt names a combination that training never shows."""
    clauses = record["include"]
    for clause in clauses:
        name = names.index(clause["class"])
        if "color" in clause and is_held_out_pair(name, COLOR_NAMES.index(clause["color"])):
            return True
        if "position" in clause:
            where, target = clause["position"]
            if is_held_out_triple(name, where, names.index(clauses[target]["class"])):
                return True
    return False


def scene_scores(
    rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """GenEval's summary, and in `held_out` and `seen` the scores of composing prompts with and without new combinations."""
    new = {record["prompt"] for record in records if holds_held_out(record, names)}
    composing = [row for row in rows if row["tag"] in COMPOSING]
    halves = {
        "held_out": [row for row in composing if row["prompt"] in new],
        "seen": [row for row in composing if row["prompt"] not in new],
    }
    apart = {}
    for half, chosen in halves.items():
        if chosen:
            summary = summarize(chosen)
            apart[half] = {
                key: summary[key] for key in ("overall", *COMPOSING, "num_images") if key in summary
            }
    return {**summarize(rows), **apart}


class SceneBenchmark:
    """Prompts over one sprite set, and the detector that scores images of them.

    Args:
        per_family: prompts of each of the six families.
        images_per_prompt: images of each prompt.
        seed: of the prompts.
    """

    def __init__(
        self,
        sprites: str = "shapes",
        *,
        per_family: int = 25,
        images_per_prompt: int = 4,
        seed: int = 43,
    ) -> None:
        self.sprites = load_sprites(sprites)
        self.images_per_prompt = images_per_prompt
        self.records = benchmark_prompts(self.sprites.names, per_family, seed)
        self.detector, self.classifier = SceneDetector(self.sprites), SceneColorClassifier()
        self.known = satisfying_images(self.records[-1:], self.sprites, image_size=64, per_prompt=1)

    def score_images(
        self,
        images: Sequence[tuple[Image.Image, dict[str, Any]]],
        progress: Progress | None = None,
        *,
        tokenizer: VQRAEModel | None = None,
    ) -> dict[str, Any]:
        """Scores of images with the records of their prompts; several processes share the work, all get the scores.

        Args:
            progress: called with (images done, images in all), of this process.
            tokenizer: score its copies of the images.
        """
        require_sight(self.detector, self.classifier, self.known)
        mine = stride([images[start : start + BATCH] for start in range(0, len(images), BATCH)])
        done = 0
        rows: list[list[dict[str, Any]]] = []
        for batch in mine:
            shown = [image for image, _ in batch]
            shown = reconstruct(shown, tokenizer) if tokenizer is not None else shown
            rows.append([])
            for image, (_, record) in zip(shown, batch, strict=True):
                rows[-1].append(evaluate_image(image, record, self.detector, self.classifier))
                done += 1
                if progress is not None:
                    progress(done, sum(map(len, mine)))
        everything = [row for part in gather_strided(rows) for row in part]
        return scene_scores(everything, self.records, self.sprites.names)

    def score_folder(
        self, folder: str | Path, progress: Progress | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Scores and result rows of a folder in GenEval's layout."""
        rows = score_folder(
            folder, self.detector, self.classifier, known=self.known, progress=progress
        )
        return scene_scores(rows, self.records, self.sprites.names), rows

    def ceilings(
        self, tokenizer: VQRAEModel, progress: Callable[[str], Progress | None]
    ) -> dict[str, Any]:
        """Scores of scenes that satisfy the prompts: `truth`, and the same after encoding and decoding."""
        size = tokenizer.config.image_size
        truth = satisfying_images(
            self.records, self.sprites, image_size=size, per_prompt=self.images_per_prompt
        )
        return {
            "truth": self.score_images(truth, progress("truth")),
            "reconstruction": self.score_images(
                truth, progress("reconstruction"), tokenizer=tokenizer
            ),
        }

    def draw(
        self,
        generator: Generator,
        folder: str | Path,
        *,
        settings: dict[str, Any],
        sampling: SamplingConfig,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> None:
        """Generate the images that `folder` lacks, in GenEval's layout; several processes share the work.

        Args:
            settings: what decides the images (weights, sampling); stored beside them.
            progress: called with (images done, images in all).

        Raises:
            ValueError: when the folder holds images of other settings or prompts.
        """
        claim_folder(
            folder,
            {**settings, "prompts": len(self.records), "images_per_prompt": self.images_per_prompt},
        )
        if is_main_process():
            write_prompts(folder, self.records)
        orders = image_orders(folder, self.records, self.images_per_prompt)
        draw_missing(generator, orders, sampling=sampling, batch_size=batch_size, progress=progress)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Score a generator by GenEval's rules on prompts about scenes."""

    model: str
    """Generator: run directory, model folder or hub id."""
    output: str
    """JSON file of the scores; GenEval's results file goes beside it as .jsonl."""
    images: str | None = None
    """Folder of the images, in GenEval's layout; `images` beside the output when not given."""
    tokenizer: str | None = None
    """Visual tokenizer, where it is not at the place that the generator recorded."""
    sprites: str = "shapes"
    """What the scenes are made of: shapes or emoji."""
    per_family: int = 25
    """Prompts of each of the six families."""
    images_per_prompt: int = 4
    """Images of each prompt."""
    prompt_seed: int = 43
    """Of the prompts."""
    sampling: SamplingConfig | None = None
    """How codes are drawn, if not as the generator recommends."""
    batch_size: int = 64
    """Images sampled at once; guidance doubles the rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the language model."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        load_sprites(self.sprites)
        if min(self.per_family, self.images_per_prompt, self.batch_size) < 1:
            raise ValueError("per_family, images_per_prompt and batch_size must be positive")
        if Path(self.output).suffix == ".jsonl":
            raise ValueError(
                f"got output={self.output}, expected a .json file: the results go beside it as .jsonl"
            )


def main(argv: list[str] | None = None) -> None:
    config = parse(GenerationConfig, argv)
    benchmark = SceneBenchmark(
        config.sprites,
        per_family=config.per_family,
        images_per_prompt=config.images_per_prompt,
        seed=config.prompt_seed,
    )
    output = Path(config.output)
    images = Path(config.images) if config.images else output.with_name("images")
    with processes(config.device) as device:
        generator = Generator.from_pretrained(
            config.model,
            tokenizer=config.tokenizer,
            device=device,
            dtype=getattr(torch, config.dtype),
        )
        sampling = config.sampling or generator.sampling
        settings = {
            "generator": model_fingerprint(config.model),
            "dtype": config.dtype,
            "sampling": dataclasses.asdict(sampling),
        }
        benchmark.draw(
            generator,
            images,
            settings=settings,
            sampling=sampling,
            batch_size=config.batch_size,
            progress=progress_of_main("images"),
        )
        scores, rows = benchmark.score_folder(images, progress_of_main("scores"))
        ceiling = benchmark.ceilings(generator.tokenizer, progress_of_main)
    if not is_main_process():
        return
    write_rows(output.with_suffix(".jsonl"), rows)
    suite = f"scenes({config.sprites}, {config.per_family} per family, seed {config.prompt_seed})"
    images_of = {**settings, "tokenizer": tokenizer_fingerprint(config.model)}
    manifest = score_manifest(detector=benchmark.detector.name, suite=suite, images=images_of)
    origin = {
        "benchmark": "GenEval-scenes",
        "detector": benchmark.detector.name,
        **settings,
        "manifest": manifest,
    }
    write_json(output, {**scores, "ceiling": ceiling, **origin})
    columns = {
        "generator": scores,
        "reconstruction": ceiling["reconstruction"],
        "truth": ceiling["truth"],
    }
    print(f"{'':<16}" + "".join(f"{name:>16}" for name in columns))
    for key in ("overall", *dict.fromkeys(record["tag"] for record in benchmark.records)):
        print(f"{key:<16}" + "".join(f"{values[key]:>16.1%}" for values in columns.values()))
    print(f"{len(rows)} images in {images}  ->  {output}")


if __name__ == "__main__":
    run_main(main)
