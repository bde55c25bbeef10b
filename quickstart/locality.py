"""Does a code tell what its patch shows, or what object the patch belongs to? Measured on scenes.

    python -m vqrae.quickstart.locality model=runs/tokenizer output=locality.json

A patch of one colour looks the same in a star and in a circle. Where its code still distinguishes
the two, codes stand for whole objects, and an object that training never showed (a red circle) has
no codes: it is reconstructed as another one, and no generator can draw it. VQRAE's Figure 4 finds
that its codes group textures where its continuous features group objects.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vqrae.common.checkpoints import model_fingerprint, resolve_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.run import kept, quiet_libraries, run_manifest
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import benchmark_prompts
from vqrae.data.scenes.scene import COLOR_VALUES, Scene
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.geneval.scenes import ceilings
from vqrae.eval.sharding import batch_indices, gather, processes
from vqrae.tokenizer.modeling import VQRAEModel

# Reconstructions are scored on these prompts of each family, and images of each prompt.
PROMPTS = 25
IMAGES = 4
# Patches with exactly the same pixels are compared when there are so many of them.
REPEATED = 100


@dataclass(frozen=True, kw_only=True)
class LocalityConfig:
    """Score what a tokenizer's codes know of objects, and its reconstructions of unseen ones."""

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
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        check_range(self, "num_images", "batch_size", low=1)


def conditional_entropy(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """H(a | b) in nats of a sample of (a, b)."""
    joint, given = Counter(pairs), Counter(b for _, b in pairs)
    return float(-sum(n * np.log(n / given[b]) for (_, b), n in joint.items()) / len(pairs))


def patches_of(scenes: SceneDataset, index: int, grid_size: int) -> np.ndarray:
    """The patches of a scene in raster order, uint8 (patches, pixels, 3)."""
    side = scenes.sampler.image_size // grid_size
    pixels = scenes.pixels(index).reshape(grid_size, side, grid_size, side, 3)
    return pixels.swapaxes(1, 2).reshape(grid_size**2, side**2, 3)


def plain_patches(scene: Scene, pixels: np.ndarray) -> list[tuple[int, int, int]]:
    """(patch, name, colour) of the patches of a scene that show the colour of one object only.

    Args:
        pixels: of `patches_of`.
    """
    grid_size, side = (math.isqrt(count) for count in pixels.shape[:2])
    plain = np.ptp(pixels, axis=1).max(-1) <= 1
    centers = side * (np.indices((grid_size, grid_size)).reshape(2, -1) + 0.5)
    found = []
    for item in scene.objects:
        distance = np.abs(pixels[:, 0] / 255 - COLOR_VALUES[item.color]).max(-1)
        y, x = (centers - [[item.top], [item.left]]) / item.size
        inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
        matches = np.flatnonzero(plain & inside & (distance < 0.1))  # emoji are shaded
        found += [(int(patch), item.name, item.color) for patch in matches]
    return found


@torch.inference_mode()
def object_knowledge(
    model: VQRAEModel, scenes: SceneDataset, batch_size: int = 64
) -> dict[str, Any]:
    """How much of an object's name its one-coloured patches' codes tell, beyond the colour.

    Several processes share the work, and all get the result.

    Returns:
        name_given_color: H(name | colour) in nats; known_share: the share of it that the code takes
        away, 0 for codes that know their patch alone and 1 for codes that know the object;
        codes_per_color; num_patches; code_given_patch: H(code | pixels of the patch) in nats over
        all patches that repeat often, 0 for codes that depend on nothing else.

    Raises:
        ValueError: for several codebooks, whose codes of a token seldom occur together again.
    """
    several = model.config.num_codebooks
    if several > 1:
        raise ValueError(f"got a tokenizer with {several} codebooks, expected one: give another")
    found, seen = [], []
    for batch in batch_indices(len(scenes), batch_size):
        images = torch.stack([scenes.image(i) for i in batch]).to(model.device).float() / 255
        rows: list[tuple[int, int, int]] = []  # name, colour, code
        pairs: list[tuple[int, bytes]] = []  # code, pixels
        for i, codes in zip(batch, model.encode(images).tolist(), strict=True):
            pixels = patches_of(scenes, i, model.config.grid_size)
            patches = plain_patches(scenes.scene(i), pixels)
            rows += [(name, color, codes[patch]) for patch, name, color in patches]
            pairs += [(code, patch.tobytes()) for code, patch in zip(codes, pixels, strict=True)]
        found.append(rows)
        seen.append(pairs)
    rows = list(itertools.chain(*gather(found)))
    pairs = list(itertools.chain(*gather(seen)))
    if not rows:
        raise ValueError(
            f"{len(scenes)} scenes hold no patch of one colour: take more, or smaller patches"
        )
    by_color = conditional_entropy([(name, color) for name, color, _ in rows])
    by_code = conditional_entropy([(name, (color, code)) for name, color, code in rows])
    times = Counter(pixels for _, pixels in pairs)
    repeated = [pair for pair in pairs if times[pair[1]] >= REPEATED]
    codes = {(color, code) for _, color, code in rows}
    colors = {color for color, _ in codes}
    return {
        "name_given_color": by_color,
        "known_share": 1 - by_code / by_color if by_color else 0.0,
        "codes_per_color": len(codes) / len(colors),
        "num_patches": len(rows),
        "code_given_patch": conditional_entropy(repeated) if repeated else 0.0,
    }


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(LocalityConfig, argv)
    quiet_libraries()

    def score() -> dict[str, Any]:
        model = VQRAEModel.from_pretrained(resolve_model(config.model)).to(device).eval()
        scenes = SceneDataset(
            size=config.num_images, image_size=model.config.image_size, sprites=config.sprites
        )
        knowledge = object_knowledge(model, scenes, config.batch_size)
        ceiling = ceilings(
            benchmark_prompts(load_sprites(config.sprites).names, PROMPTS),
            model,
            sprites=config.sprites,
            images_per_prompt=IMAGES,
        )["reconstruction"]
        halves = {half: ceiling[half]["overall"] for half in ("seen", "held_out")}
        return {**knowledge, "reconstruction": halves, "manifest": run_manifest()}

    settings = {
        "tokenizer": model_fingerprint(config.model),
        "sprites": config.sprites,
        "num_images": config.num_images,
    }
    with processes(config.device) as device:
        scores = kept(config.output, settings, score)
    if is_main_process():
        halves = scores["reconstruction"]
        print(
            f"codes of one-coloured patches know {scores['known_share']:.0%} of the name of their "
            f"object ({scores['codes_per_color']:.1f} codes a colour, {scores['num_patches']:,} "
            "patches)\n"
            f"equal patches leave {scores['code_given_patch']:.2f} nats of their codes open\n"
            f"reconstructions satisfy GenEval's rules: {halves['seen']:.0%} of "
            f"combinations seen in training, {halves['held_out']:.0%} of others  "
            f"->  {config.output}"
        )


if __name__ == "__main__":
    run_main(main)
