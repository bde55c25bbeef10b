"""Images for a benchmark: drawn where they are missing, beside a record of what decides them, so that a run resumes."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from transformers import PreTrainedConfig

from vqrae.common.checkpoints import resolve_model
from vqrae.common.distributed import choose_device, is_main_process
from vqrae.common.files import read_json, write_json
from vqrae.common.images import save_image, tensor_to_image
from vqrae.common.run import hold
from vqrae.eval.manifest import model_fingerprint, tokenizer_fingerprint
from vqrae.eval.sharding import gather, stride
from vqrae.generation.modeling import read_sampling
from vqrae.generation.sampling import SamplingConfig

if TYPE_CHECKING:
    from vqrae.generation.generator import Generator

Progress = Callable[[int, int], None]
SEEDS_PER_PROMPT = (
    10_000  # image seeds are 10,000 x prompt + sample: more samples never change those there are
)


class Order(NamedTuple):
    """An image that is wanted: what to draw, with which seed, and where it belongs."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where a benchmark's images come from: a generator draws them, or they are there."""

    out: str
    """Folder of everything that is written."""
    model: str | None = None
    """Generator to draw with: run directory, model folder or hub id."""
    images: str | None = None
    """Folder of images to score instead."""
    tokenizer: str | None = None
    """Visual tokenizer, where it is not at the place that the generator recorded."""
    sampling: SamplingConfig | None = None
    """How codes are drawn, if not as the generator recommends."""
    batch_size: int = 64
    """Images sampled at once; guidance doubles the rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the language model."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.images is None):
            raise ValueError("give either model= to draw with, or images= to score")
        if self.images is not None and not Path(self.images).is_dir():
            raise ValueError(f"images={self.images} is not a folder")
        if self.batch_size < 1:
            raise ValueError(f"got batch_size={self.batch_size}, expected a positive number")

    def chosen_device(self) -> str:
        """`device`, with auto resolved."""
        return choose_device(self.device)

    def load_generator(self, device: str) -> "Generator":
        """The generator that `model` names."""
        from vqrae.generation.generator import (
            Generator,  # seconds of imports that scoring does without
        )

        assert self.model is not None
        dtype = getattr(torch, self.dtype)
        return Generator.from_pretrained(
            self.model, tokenizer=self.tokenizer, device=device, dtype=dtype
        )

    def drawing_settings(self) -> dict[str, Any]:
        """What decides the images of a prompt and a seed."""
        assert self.model is not None
        sampling = self.sampling or read_sampling(
            PreTrainedConfig.from_pretrained(resolve_model(self.model))
        )
        weights = {
            "generator": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.model),
        }
        return {**weights, "dtype": self.dtype, "sampling": dataclasses.asdict(sampling)}


def image_seed(prompt: int, sample: int) -> int:
    """The seed of image number `sample` of prompt number `prompt`."""
    return SEEDS_PER_PROMPT * prompt + sample


def claim_folder(folder: str | Path, settings: dict[str, Any], key: str = "images") -> None:
    """Record in `settings.json` what decides the content of a folder, which the argument `key` names.

    Raises:
        ValueError: when the folder holds something that was made with other settings, or another launch works on it.
    """
    stored, lock = Path(folder) / "settings.json", Path(folder) / ".lock"
    if is_main_process():
        lock.parent.mkdir(parents=True, exist_ok=True)
        hold(lock, str(folder))
    before = read_json(stored) if stored.exists() else settings
    if before != settings and any(path not in (stored, lock) for path in stored.parent.iterdir()):
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        changes = ", ".join(
            f"{name} {before.get(name)!s:.60} -> {settings.get(name)!s:.60}" for name in names
        )
        raise ValueError(
            f"{folder} was made with other settings ({changes}): set {key}= to a new folder, or delete this one"
        )
    if is_main_process():
        write_json(stored, settings)


def draw_missing(
    generator: "Generator",
    orders: Sequence[Order],
    *,
    sampling: SamplingConfig | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> None:
    """Generate the ordered images that do not exist yet; several processes share the work, and wait for each other.

    Args:
        progress: called with (images done, images in all), of this process.
    """
    mine = stride(orders)
    missing = [order for order in mine if not order.path.exists()]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        prompts, seeds = [order.prompt for order in batch], [order.seed for order in batch]
        images = generator.images(prompts, seeds=seeds, sampling=sampling, batch_size=batch_size)
        for order, image in zip(batch, images, strict=True):
            save_image(tensor_to_image(image), order.path)
        if progress is not None:
            progress(len(mine) - len(missing) + start + len(batch), len(mine))
    gather([])
