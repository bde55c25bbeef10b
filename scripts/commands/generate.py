"""Draw images from prompts."""

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqrae.scripts.commands.shared import (
    BATCH_SIZE,
    GRID_COLUMNS,
    GRID_ROWS,
    add_command,
    enlarged_grid,
    quiet,
)

if TYPE_CHECKING:
    from vqrae.generation.sampling import SamplingConfig

SAMPLING_OPTIONS: dict[str, dict[str, Any]] = {
    "guidance-scale": {"type": float},
    "guidance-schedule": {"choices": ["constant", "linear", "cosine"]},
    "guidance-start": {"type": float},
    "guidance-end": {"type": float},
    "temperature": {"type": float},
    "top-k": {"type": int},
    "top-p": {"type": float},
    "min-p": {"type": float},
    "window": {"type": int},
}


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(
        commands, "generate", generate, "draw images from prompts", model="generator"
    )
    command.add_argument("--prompt", action="append", default=[], help="may be given several times")
    command.add_argument(
        "--prompts-file",
        help="a text file with one prompt per line, or JSON lines, whose key prompt is drawn",
    )
    command.add_argument(
        "--num-images", type=int, default=4, help="images per prompt (default: %(default)s)"
    )
    command.add_argument(
        "--out", required=True, help="folder for the images, a JSON side-car for each, and grid.png"
    )
    command.add_argument(
        "--tokenizer", help="the visual tokenizer, where it has moved since training"
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first image of each prompt (default: %(default)s)",
    )
    command.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help="images at once (default: %(default)s)"
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the language model (default: %(default)s)",
    )
    command.add_argument(
        "--compile", action="store_true", help="for CUDA: one recorded graph per step"
    )
    for option, kind in SAMPLING_OPTIONS.items():
        command.add_argument(
            f"--{option}", **kind, help="sampling (default: what the generator recommends)"
        )


def generate(arguments: argparse.Namespace) -> None:
    """Draw `--num-images` images of each prompt, each with a JSON side-car that says how to draw it again.

    An image whose side-car says just that is finished, and is not drawn again.
    """
    import torch

    from vqrae.common.checkpoints import resolve_model
    from vqrae.common.cli import progress_line
    from vqrae.common.files import printable, weights_fingerprint, write_json
    from vqrae.common.images import image_to_tensor, open_image, save_image, tensor_to_image
    from vqrae.generation.generator import Generator

    prompts = _read_prompts(arguments)
    quiet()
    generator = Generator.from_pretrained(
        arguments.model,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
        compile=arguments.compile,
    )
    for prompt in dict.fromkeys(prompts):
        for lost in generator.encode_prompt.losses(prompt):
            print(printable(f"vqrae: prompt {prompt[:60]!r}: {lost}"), file=sys.stderr)
    sampling = _read_sampling(arguments, generator.sampling)
    settings = {
        "sampling": asdict(sampling),
        "dtype": arguments.dtype,
        "generator": arguments.model,
        "generator_weights": weights_fingerprint(resolve_model(arguments.model)),
        "tokenizer": generator.model.config.vqrae_tokenizer_fingerprint,
    }
    out = Path(arguments.out)
    records = {
        out / f"{i:04d}-{seed}": {"prompt": prompt, "seed": seed, **settings}
        for i, prompt in enumerate(prompts)
        for seed in range(arguments.seed, arguments.seed + arguments.num_images)
    }
    missing = [path for path, record in records.items() if not _is_finished(path, record)]
    progress = progress_line("generate")
    for start in range(0, len(missing), arguments.batch_size):
        batch = missing[start : start + arguments.batch_size]

        def report(done: int, total: int, start: int = start, count: int = len(batch)) -> None:
            if drawn := start + count * done // total:
                progress(drawn, len(missing))

        images = generator.images(
            [records[path]["prompt"] for path in batch],
            seeds=[records[path]["seed"] for path in batch],
            sampling=sampling,
            batch_size=arguments.batch_size,
            progress=report,
        )
        for path, image in zip(batch, images, strict=True):
            save_image(tensor_to_image(image), path.with_suffix(".png"))
            write_json(path.with_suffix(".json"), records[path])  # last: what has one is finished
    shown = prompts[:GRID_ROWS]
    rows = [
        list(records)[i * arguments.num_images :][: min(arguments.num_images, GRID_COLUMNS)]
        for i in range(len(shown))
    ]
    grid = [[image_to_tensor(open_image(path.with_suffix(".png"))) for path in row] for row in rows]
    save_image(enlarged_grid(grid, labels=shown), out / "grid.png")
    there = (
        f", {len(records) - len(missing)} of them were there" if len(missing) < len(records) else ""
    )
    print(f"{len(records)} images are in {out}{there}; see grid.png")


def _is_finished(path: Path, record: dict[str, Any]) -> bool:
    """Whether the image is there and was drawn like this, wherever the generator lay then."""
    from vqrae.common.files import read_json

    side_car = path.with_suffix(".json")
    if not (path.with_suffix(".png").exists() and side_car.exists()):
        return False
    return {**read_json(side_car), "generator": record["generator"]} == record


def _read_sampling(
    arguments: argparse.Namespace, recommended: "SamplingConfig"
) -> "SamplingConfig":
    given = {field.name: getattr(arguments, field.name) for field in fields(recommended)}
    return replace(
        recommended, **{name: value for name, value in given.items() if value is not None}
    )


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file:
        prompts += _prompts_of(arguments.prompts_file)
    if not prompts:
        raise ValueError(
            "no prompt: give --prompt TEXT or --prompts-file FILE with one prompt per line"
        )
    for option in ("num_images", "batch_size"):
        if getattr(arguments, option) < 1:
            raise ValueError(
                f"--{option.replace('_', '-')}: got {getattr(arguments, option)}, expected at least 1"
            )
    return prompts


def _prompts_of(path: str) -> list[str]:
    """The lines of a text file, or the `prompt` of each where lines are JSON objects, as GenEval's metadata.

    Raises:
        ValueError: naming the line, for a JSON object without a prompt.
    """
    from vqrae.common.files import text_lines

    prompts = []
    for number, line in text_lines(path):
        try:
            value = json.loads(line) if line.lstrip().startswith("{") else line.strip()
        except ValueError:  # text that begins with a brace
            value = line.strip()
        if isinstance(value, dict):
            value = value.get("prompt")
            if not isinstance(value, str):
                raise ValueError(
                    f"{path}, line {number}: got JSON without a text under the key prompt: {line[:80]}"
                )
        if value:
            prompts.append(value)
    return prompts
