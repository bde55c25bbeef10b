"""Generate images from prompts."""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from vqrae.common.checkpoints import resolve_model
from vqrae.common.cli import progress_line
from vqrae.common.config import check_range
from vqrae.common.files import printable, read_json, text_lines, weights_fingerprint, write_json
from vqrae.common.images import image_to_tensor, open_image, save_image, tensor_to_image
from vqrae.generation.generator import Generator
from vqrae.generation.sampling import SamplingConfig
from vqrae.mllm.inference import open_generator
from vqrae.scripts.commands.images import BATCH_SIZE, GRID_COLUMNS, enlarged_grid

GRID_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Fields of `SamplingConfig`; null is what the generator recommends."""

    guidance_scale: float | None = None
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate images from prompts, each with a JSON file that says how to make it again.

    An image whose JSON file says just that is finished, and is not generated again.
    """

    model: str
    """Generator: run directory, model folder or hub id."""
    out: str
    """Folder for the images, a JSON file for each, and grid.png."""
    prompt: tuple[str, ...] = ()
    """May be given several times."""
    prompts_file: str | None = None
    """A text file with a prompt on each line, or JSON lines with the key `prompt`."""
    num_images: int = 4
    """Images per prompt."""
    seed: int = 0
    """Of the first image of each prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    """How codes are sampled."""
    tokenizer: str | None = None
    """The visual tokenizer, where it has moved since training."""
    batch_size: int = BATCH_SIZE
    """Images at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the language model."""
    compile: bool = False
    """For CUDA: one recorded graph per step."""
    device: str | None = None
    """cpu, cuda, ...; by default CUDA if torch sees a GPU."""

    def __post_init__(self) -> None:
        check_range(self, "num_images", "batch_size", low=1)
        if not self.prompt and self.prompts_file is None:
            raise ValueError("no prompt: give --prompt TEXT, or --prompts-file FILE")

    def run(self) -> None:
        prompts = [*self.prompt, *(read_prompts(self.prompts_file) if self.prompts_file else [])]
        logging.disable_progress_bar()
        generator = open_generator(
            self.model,
            tokenizer=self.tokenizer,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            compile=self.compile,
        )
        for prompt in dict.fromkeys(prompts):
            for lost in generator.encode_prompt.losses(prompt):
                print(printable(f"vqrae: prompt {prompt[:60]!r}: {lost}"), file=sys.stderr)
        given = {key: value for key, value in asdict(self.sampling).items() if value is not None}
        sampling = replace(generator.sampling, **given)
        settings = {
            "sampling": asdict(sampling),
            "dtype": self.dtype,
            "generator": self.model,
            "generator_weights": weights_fingerprint(resolve_model(self.model)),
            "tokenizer": generator.model.config.vqrae_tokenizer_fingerprint,
        }
        records = self.records(prompts, settings)
        missing = {path: made for path, made in records.items() if not is_finished(path, made)}
        self.generate(generator, sampling, missing)
        self.save_grid(prompts, list(records))
        count = len(records) - len(missing)
        before = f", {count} of them from before" if count else ""
        print(f"{len(records)} images are in {self.out}{before}; see grid.png")

    def records(self, prompts: list[str], settings: dict[str, Any]) -> dict[Path, dict[str, Any]]:
        """What makes each image, by its path without a suffix."""
        records = {}
        for i, prompt in enumerate(prompts):
            for seed in range(self.seed, self.seed + self.num_images):
                path = Path(self.out) / f"{i:04d}-{seed}"
                records[path] = {"prompt": prompt, "seed": seed, **settings}
        return records

    def generate(
        self, generator: Generator, sampling: SamplingConfig, records: dict[Path, dict[str, Any]]
    ) -> None:
        """Generate and write the images of these records."""
        show = progress_line("generate")
        for start in range(0, len(records), self.batch_size):
            batch = list(records.items())[start : start + self.batch_size]
            prompts = [record["prompt"] for _, record in batch]
            seeds = [record["seed"] for _, record in batch]

            def report(done: int, total: int, start: int = start, count: int = len(batch)) -> None:
                if whole := start + count * done // total:
                    show(whole, len(records))

            images = generator.images(
                prompts, seeds=seeds, sampling=sampling, batch_size=self.batch_size, progress=report
            )
            for (path, record), image in zip(batch, images, strict=True):
                save_image(tensor_to_image(image), path.with_suffix(".png"))
                # Last: an image that has one is finished.
                write_json(path.with_suffix(".json"), record)

    def save_grid(self, prompts: list[str], paths: list[Path]) -> None:
        """A row of images for each of the first prompts."""
        rows = []
        for i in range(min(len(prompts), GRID_ROWS)):
            row = paths[i * self.num_images :][: min(self.num_images, GRID_COLUMNS)]
            rows.append([image_to_tensor(open_image(path.with_suffix(".png"))) for path in row])
        save_image(enlarged_grid(rows, labels=prompts[:GRID_ROWS]), Path(self.out) / "grid.png")


def is_finished(path: Path, record: dict[str, Any]) -> bool:
    """Whether the image exists and was made like this, wherever the generator was then."""
    side_car = path.with_suffix(".json")
    if not (path.with_suffix(".png").exists() and side_car.exists()):
        return False
    return {**read_json(side_car), "generator": record["generator"]} == record


def read_prompts(path: str) -> list[str]:
    """The lines of a text file, or the `prompt` of JSON lines, as in GenEval's metadata."""
    prompts = []
    for number, line in text_lines(path):
        value: Any = line.strip()
        if value.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:  # text that begins with a brace
                prompts.append(value)
                continue
            value = value.get("prompt")
            if not isinstance(value, str):
                got = f"got JSON without a text under the key prompt: {line[:80]}"
                raise ValueError(f"{path}, line {number}: {got}")
        if value:
            prompts.append(value)
    return prompts
