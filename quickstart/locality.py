"""Does a code say what its patch shows, or what thing the patch belongs to? Measured on scenes.

    python -m vqrae.quickstart.locality model=runs/tokenizer output=locality.json

A patch of one colour looks the same in a star and in a circle. Where its code still tells which of the two it lies in, codes
stand for whole things, and a thing that training never showed (a red circle) has no codes: it comes back as another one, and
no generator can draw it. VQRAE's Figure 4 finds that its codes group textures where its continuous features group objects.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqrae.common.checkpoints import resolve_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import write_json
from vqrae.common.run import quiet_libraries
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import benchmark_prompts
from vqrae.data.scenes.scene import COLOR_VALUES
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.geneval.scenes import ceilings
from vqrae.eval.manifest import model_fingerprint, score_manifest
from vqrae.eval.sharding import gather_strided, processes, progress_of_main, stride
from vqrae.tokenizer.modeling import VQRAEModel

PROMPTS, IMAGES = (
    25,
    4,
)  # of each family of prompts, and of each prompt, that reconstructions are scored on


@dataclass(frozen=True, kw_only=True)
class LocalityConfig:
    """Ask a tokenizer's codes what they know of the thing around their patch, and how unseen combinations come back."""

    model: str
    """Tokenizer: run directory, checkpoint folder or hub id."""
    output: str
    """JSON file of the scores."""
    sprites: str = "shapes"
    """What the scenes are made of: shapes or emoji."""
    num_images: int = 3000
    """Training scenes that one-coloured patches are taken from."""
    batch_size: int = 64
    """Images of one pass."""

    def __post_init__(self) -> None:
        check_range(self, "num_images", "batch_size", low=1)

    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""


def conditional_entropy(pairs: Iterable[tuple[Hashable, Hashable]]) -> float:
    """H(a | b) in nats of a sample of (a, b)."""
    pairs = list(pairs)
    joint, given = Counter(pairs), Counter(b for _, b in pairs)
    return float(-sum(n * np.log(n / given[b]) for (_, b), n in joint.items()) / len(pairs))


def plain_patches(scenes: SceneDataset, index: int, grid_size: int) -> list[tuple[int, int, int]]:
    """(patch, name, colour) of the patches of scene `index` that show nothing but the paint of one object."""
    size = scenes.sampler.image_size
    side = size // grid_size
    pixels = (
        scenes.pixels(index)
        .reshape(grid_size, side, grid_size, side, 3)
        .swapaxes(1, 2)
        .reshape(grid_size**2, -1, 3)
    )
    plain = np.ptp(pixels, axis=1).max(-1) <= 1
    found = []
    for item in scenes.scene(index).objects:
        painted = (
            np.abs(pixels[:, 0] / 255 - COLOR_VALUES[item.color]).max(-1) < 0.1
        )  # emoji are shaded
        y, x = (
            side * (np.indices((grid_size, grid_size)).reshape(2, -1) + 0.5)
            - [[item.top], [item.left]]
        ) / item.size
        inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
        found += [
            (int(patch), item.name, item.color)
            for patch in np.flatnonzero(plain & painted & inside)
        ]
    return found


@torch.inference_mode()
def object_knowledge(
    model: VQRAEModel, scenes: SceneDataset, batch_size: int = 64
) -> dict[str, Any]:
    """How much of an object's name its one-coloured patches' codes tell, beyond the colour.

    Several processes share the work, and all get the result.

    Returns:
        name_given_color: H(name | colour) in nats; known_share: the share of it that the code takes away, 0 for codes that
        know nothing but their patch and 1 for codes that know the thing; codes_per_color; num_patches.
    """
    found: list[list[tuple[int, int, int]]] = []  # name, colour, code; of each batch
    for start in stride(range(0, len(scenes), batch_size)):
        chunk = range(start, min(start + batch_size, len(scenes)))
        images: Tensor = (
            torch.stack([scenes.image(i) for i in chunk]).to(model.device).float() / 255
        )
        found.append([])
        for i, codes in zip(chunk, model.encode(images).tolist(), strict=True):
            patches = plain_patches(scenes, i, model.config.grid_size)
            found[-1] += [(name, color, codes[patch]) for patch, name, color in patches]
    rows = [row for part in gather_strided(found) for row in part]
    if not rows:
        raise ValueError(
            f"{len(scenes)} scenes hold no patch of one colour: take more, or smaller patches"
        )
    by_color = conditional_entropy((name, color) for name, color, _ in rows)
    by_code = conditional_entropy((name, (color, code)) for name, color, code in rows)
    codes_per_color = len({(color, code) for _, color, code in rows}) / len(
        {color for _, color, _ in rows}
    )
    known = 1 - by_code / by_color if by_color else 0.0
    return {
        "name_given_color": by_color,
        "known_share": known,
        "codes_per_color": codes_per_color,
        "num_patches": len(rows),
    }


def main(argv: list[str] | None = None) -> None:
    config = parse(LocalityConfig, argv)
    quiet_libraries()
    with processes(config.device) as device:
        model = VQRAEModel.from_pretrained(resolve_model(config.model)).to(device).eval()
        scenes = SceneDataset(
            size=config.num_images, image_size=model.config.image_size, sprites=config.sprites
        )
        knowledge = object_knowledge(model, scenes, config.batch_size)
        prompts = benchmark_prompts(load_sprites(config.sprites).names, PROMPTS)
        ceiling = ceilings(
            prompts,
            model,
            sprites=config.sprites,
            images_per_prompt=IMAGES,
            progress=progress_of_main,
        )["reconstruction"]
    if not is_main_process():
        return
    reconstruction = {half: ceiling[half]["overall"] for half in ("seen", "held_out")}
    manifest = score_manifest(
        suite=f"scenes({config.sprites})", tokenizer=model_fingerprint(config.model)
    )
    write_json(config.output, {**knowledge, "reconstruction": reconstruction, "manifest": manifest})
    print(
        f"codes of one-coloured patches know {knowledge['known_share']:.0%} of the name of their thing "
        f"({knowledge['codes_per_color']:.1f} codes a colour, {knowledge['num_patches']:,} patches)"
    )
    print(
        f"reconstructions satisfy GenEval's rules: {reconstruction['seen']:.0%} of combinations seen in training, ",
        end="",
    )
    print(f"{reconstruction['held_out']:.0%} of others  ->  {config.output}")


if __name__ == "__main__":
    run_main(main)
