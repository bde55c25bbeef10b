"""Draw pictures from prompts."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqrae.scripts.commands.shared import BATCH_SIZE, GRID_COLUMNS, GRID_ROWS, add_command, enlarged_grid, quiet

if TYPE_CHECKING:
    from torch import Tensor


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(commands, "generate", generate, "draw pictures from prompts", model="generator")
    command.add_argument("--prompt", action="append", default=[], help="may be given several times")
    command.add_argument("--prompts-file", help="a text file with one prompt per line")
    command.add_argument("--num-images", type=int, default=4, help="pictures per prompt (default: %(default)s)")
    command.add_argument("--out", required=True, help="folder for the pictures, a JSON side-car for each, and grid.png")
    command.add_argument("--tokenizer", help="the visual tokenizer, where it has moved since training")
    command.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt (default: %(default)s)")
    for option, kind in {"guidance-scale": float, "temperature": float, "top-k": int, "top-p": float, "min-p": float}.items():
        command.add_argument(f"--{option}", type=kind, help="sampling; see vqrae.generation.sampling for the default")


def generate(arguments: argparse.Namespace) -> None:
    """Draw `--num-images` pictures of each prompt, each with a JSON side-car that says how to draw it again."""
    from vqrae.common.cli import progress_line
    from vqrae.common.files import write_json
    from vqrae.common.pictures import save_picture, tensor_to_picture
    from vqrae.generation.generator import Generator
    from vqrae.generation.sampling import SamplingConfig

    progress = progress_line("generate")
    prompts = _read_prompts(arguments)
    given = {name: getattr(arguments, name) for name in ("guidance_scale", "temperature", "top_k", "top_p", "min_p")}
    sampling = SamplingConfig(**{name: value for name, value in given.items() if value is not None})
    quiet()
    generator = Generator.from_pretrained(arguments.model, tokenizer=arguments.tokenizer, device=arguments.device)
    fingerprint = generator.model.config.vqrae_tokenizer_fingerprint
    jobs = [(i, prompt, arguments.seed + j) for i, prompt in enumerate(prompts) for j in range(arguments.num_images)]
    out = Path(arguments.out)
    rows: dict[int, list[Tensor]] = {i: [] for i in range(min(len(prompts), GRID_ROWS))}
    for start in range(0, len(jobs), BATCH_SIZE):
        batch = jobs[start : start + BATCH_SIZE]
        images = generator.images([prompt for _, prompt, _ in batch], seeds=[seed for *_, seed in batch], sampling=sampling)
        for (i, prompt, seed), image in zip(batch, images, strict=True):
            name = f"{i:04d}-{seed}"
            save_picture(tensor_to_picture(image), out / f"{name}.png")
            record = {"prompt": prompt, "seed": seed, "sampling": asdict(sampling), "generator": arguments.model}
            write_json(out / f"{name}.json", record | {"tokenizer": fingerprint})
            if i in rows and len(rows[i]) < GRID_COLUMNS:
                rows[i].append(image)
        progress(start + len(batch), len(jobs))
    save_picture(enlarged_grid(list(rows.values()), labels=prompts[: len(rows)]), out / "grid.png")
    print(f"{len(jobs)} pictures are in {out}; see grid.png")


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file:
        text = Path(arguments.prompts_file).read_text(encoding="utf-8")
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE with one prompt per line")
    if arguments.num_images < 1:
        raise ValueError(f"--num-images: got {arguments.num_images}, expected at least 1")
    return prompts
