"""Images for a benchmark: generated where they are missing, with a record of what decides them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from transformers import PreTrainedConfig

from vqrae.common.checkpoints import model_fingerprint, recorded_tokenizer, resolve_model
from vqrae.common.distributed import is_main_process
from vqrae.common.files import read_json, write_json
from vqrae.common.images import save_image, tensor_to_image
from vqrae.common.run import hold_folder, refuse_other_settings
from vqrae.eval.sharding import gather, progress_of_main, stride
from vqrae.generation.sampling import SamplingConfig, read_sampling

if TYPE_CHECKING:
    from vqrae.generation.generator import Generator

# Image seeds are 10,000 x prompt + sample: more samples never change those that exist.
SEEDS_PER_PROMPT = 10_000


class ImageRequest(NamedTuple):
    """A wanted image: its prompt, its seed, and where it belongs."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where a benchmark's images come from: a generator, or a folder."""

    model: str | None = None
    """Generator: run directory, model folder or hub id."""
    images: str | None = None
    """Folder of images to score instead."""
    tokenizer: str | None = None
    """Visual tokenizer, if it is not where the generator recorded it."""
    sampling: SamplingConfig | None = None
    """How codes are sampled, if not as the generator recommends."""
    batch_size: int = 64
    """Images sampled at once; guidance doubles the rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the language model."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.images is None):
            raise ValueError("give either model= to generate images with, or images= to score")
        if self.images is not None:
            self.require_images(Path(self.images))
        if self.batch_size < 1:
            raise ValueError(f"got batch_size={self.batch_size}, expected a positive number")

    def require_images(self, images: Path) -> None:
        """Refuse, with ValueError, what cannot be scored."""
        if not images.is_dir():
            raise ValueError(f"images={images} is not a folder")

    def load_generator(self, device: str) -> "Generator":
        """The generator that `model` names."""
        from vqrae.mllm.inference import open_generator  # scoring does without these imports

        assert self.model is not None
        dtype = getattr(torch, self.dtype)
        return open_generator(self.model, tokenizer=self.tokenizer, device=device, dtype=dtype)

    def generate(self, generator: "Generator", requests: Sequence[ImageRequest]) -> None:
        """Generate the images that do not exist yet, see `generate_missing`."""
        generate_missing(
            generator,
            requests,
            sampling=self.sampling,
            batch_size=self.batch_size,
            progress=progress_of_main("images"),
        )

    def generation_settings(self) -> dict[str, Any]:
        """What decides the image of a prompt and a seed."""
        assert self.model is not None
        sampling = self.sampling
        if sampling is None:
            sampling = read_sampling(PreTrainedConfig.from_pretrained(resolve_model(self.model)))
        return {
            "generator": model_fingerprint(self.model),
            "tokenizer": recorded_tokenizer(self.model),
            "dtype": self.dtype,
            "sampling": dataclasses.asdict(sampling),
        }


def image_seed(prompt: int, sample: int) -> int:
    """The seed of image number `sample` of prompt number `prompt`."""
    return SEEDS_PER_PROMPT * prompt + sample


def claim_folder(folder: str | Path, settings: dict[str, Any], key: str) -> None:
    """Record in `settings.json` what decides a folder's content; the argument `key` names it.

    Raises ValueError when the folder was filled with other settings, or another launch works on it.
    """
    stored, lock = Path(folder) / "settings.json", Path(folder) / ".lock"
    hold_folder(folder)
    if stored.exists():  # the folder too, which the main process may be about to make
        others = [path for path in stored.parent.iterdir() if path not in (stored, lock)]
        if others:
            remedy = f"set {key}= to a new folder, or delete this one"
            refuse_other_settings(folder, read_json(stored), settings, remedy)
    if is_main_process():
        write_json(stored, settings)


def generate_missing(
    generator: "Generator", requests: Sequence[ImageRequest], **options: Any
) -> None:
    """`make_images` with these options; processes share the work, then wait for all."""
    make_images(generator, stride(requests), **options)
    gather([])


def make_images(
    generator: "Generator",
    requests: Sequence[ImageRequest],
    *,
    sampling: SamplingConfig | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None],
) -> None:
    """Generate the images that do not exist yet, in this process alone."""
    missing = [request for request in requests if not request.path.exists()]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        prompts = [request.prompt for request in batch]
        seeds = [request.seed for request in batch]
        images = generator.images(prompts, seeds=seeds, sampling=sampling, batch_size=batch_size)
        for request, image in zip(batch, images, strict=True):
            save_image(tensor_to_image(image), request.path)
        progress(len(requests) - len(missing) + start + len(batch), len(requests))
