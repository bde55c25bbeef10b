"""Pictures for a benchmark: drawn where they are missing, beside a record of what decides them, so that a run resumes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from vqrae.common.distributed import is_main_process
from vqrae.common.files import read_json, write_json
from vqrae.common.pictures import save_picture, tensor_to_picture
from vqrae.eval.sharding import gather

if TYPE_CHECKING:  # their imports take seconds, which writing prompts or scoring pictures does without
    from vqrae.generation.generator import Generator
    from vqrae.generation.sampling import SamplingConfig

Progress = Callable[[int, int], None]
SEEDS_PER_PROMPT = 10_000  # picture seeds are 10,000 x prompt + sample: more samples never change those there are


class Order(NamedTuple):
    """A picture that is wanted: what to draw, with which seed, and where it belongs."""

    prompt: str
    seed: int
    path: Path


def picture_seed(prompt: int, sample: int) -> int:
    """The seed of picture number `sample` of prompt number `prompt`."""
    return SEEDS_PER_PROMPT * prompt + sample


def claim_folder(folder: str | Path, settings: dict[str, Any], key: str = "pictures") -> None:
    """Record in `settings.json` what decides the content of a folder, which the argument `key` names.

    Raises:
        ValueError: when the folder was made with other settings.
    """
    stored = Path(folder) / "settings.json"
    if stored.exists() and read_json(stored) != settings:
        raise ValueError(
            f"{folder} was made with {read_json(stored)}, expected {settings}: set {key}= to a new folder, or delete this one"
        )
    if is_main_process():
        write_json(stored, settings)


def draw_missing(
    generator: "Generator",
    orders: Sequence[Order],
    *,
    sampling: "SamplingConfig",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> None:
    """Generate the ordered pictures that do not exist yet; several processes share the work, and wait for each other.

    Args:
        progress: called with (pictures done, pictures in all), of this process.
    """
    mine = orders if not dist.is_initialized() else orders[dist.get_rank() :: dist.get_world_size()]
    missing = [order for order in mine if not order.path.exists()]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        prompts, seeds = [order.prompt for order in batch], [order.seed for order in batch]
        images = generator.images(prompts, seeds=seeds, sampling=sampling, batch_size=batch_size)
        for order, image in zip(batch, images, strict=True):
            save_picture(tensor_to_picture(image), order.path)
        if progress is not None:
            progress(len(mine) - len(missing) + start + len(batch), len(mine))
    gather([])
