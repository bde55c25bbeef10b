"""Images and captions -> code shards, so that training the generator never runs the tokenizer.

    python -m vqrae.generation.extract_codes tiny tokenizer=RUN source=scenes output_dir=CODES
    torchrun --nproc-per-node=8 -m vqrae.generation.extract_codes qwen3_0_6b source='DIR/*.tar'

Every process takes every n-th shard. The same command skips finished shards;
`vqrae check-data CODES` reads all of them again.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqrae.common.checkpoints import local_model
from vqrae.common.cli import parse
from vqrae.common.distributed import worker_options, world_size
from vqrae.common.errors import run_main
from vqrae.common.files import weights_fingerprint
from vqrae.common.run import format_duration
from vqrae.data.code_shards import CodeManifest, CodeWriter
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.sources import open_pairs
from vqrae.data.stream import Draw
from vqrae.generation.config import ExtractionConfig, GeneratorConfig
from vqrae.generation.data import encode_images, load_frozen_tokenizer
from vqrae.tokenizer.modeling import VQRAEModel

REPORT_SECONDS = 5.0


def main(argv: list[str] | None = None) -> None:
    config = parse(GeneratorConfig, argv, package="vqrae.generation", section="extraction")
    extract(config)


def extract(config: ExtractionConfig) -> None:
    """Write this process's share of a code set; shards that are complete are kept."""
    rank, processes = int(os.environ.get("RANK", "0")), world_size()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    folder = local_model(config.tokenizer)
    model = load_frozen_tokenizer(folder).to(device)
    pairs = open_pairs(
        config.source,
        image_size=model.config.image_size,
        size=config.size,
        split=config.split,
        crop=config.crop,
        seed=config.seed,
    )
    images = ImagesToEncode(pairs, config.captions_per_image, config.crops_per_image)
    manifest = CodeManifest(
        tokenizer_fingerprint=weights_fingerprint(folder),
        codebook_size=model.config.codebook_size,
        num_codebooks=model.config.num_codebooks,
        grid_size=model.config.grid_size,
        source=f"{config.source} ({config.split}, seed {config.seed})",
        num_images=len(images),
        shard_size=config.shard_size,
        captions_per_image=images.captions_per_image,
        crop=config.crop,
        crops_per_image=config.crops_per_image,
    )
    writer = CodeWriter(config.output_dir, manifest)
    mine = range(rank, manifest.num_shards, processes)
    missing = [shard for shard in mine if not writer.is_complete(shard)]
    total, done = sum(len(manifest.images_of(shard)) for shard in missing), 0
    started = reported = time.monotonic()
    options = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    for count in write_shards(model, images, writer, missing, **options):
        done += count
        now = time.monotonic()
        if rank == 0 and (now - reported > REPORT_SECONDS or done == total):
            reported = now
            speed = done / (now - started)
            print(
                f"codes {done}/{total}  {speed * processes:.0f} images/s  "
                f"{format_duration((total - done) / speed)} left",
                flush=True,
            )
    # Printed by the process that ends last.
    if all(writer.is_complete(shard) for shard in range(manifest.num_shards)):
        size = f"{manifest.num_images} images x {math.prod(manifest.code_shape)} codes"
        print(f"finished: {config.output_dir} ({size})", flush=True)


class ImagesToEncode(Dataset):
    """A pair source as {"image": uint8 (3, H, W), "captions": list}.

    Args:
        captions_per_image: wordings of each scene; any other source has one caption for each image.
        crops_per_image: passes over the source, each with other random crops.

    Raises:
        ValueError: when several crops are asked of scenes.
    """

    def __init__(self, pairs: Any, captions_per_image: int = 1, crops_per_image: int = 1) -> None:
        if crops_per_image != 1 and isinstance(pairs, SceneDataset):
            raise ValueError(
                f"got crops_per_image={crops_per_image}, expected 1: scenes are square, and "
                "endless: raise size"
            )
        self.pairs, self.crops_per_image = pairs, crops_per_image
        self.captions_per_image = captions_per_image if isinstance(pairs, SceneDataset) else 1

    def __len__(self) -> int:
        return len(self.pairs) * self.crops_per_image

    def __getitem__(self, index: int) -> dict[str, Any]:
        crop, row = divmod(index, len(self.pairs))
        sample = self.pairs[Draw(row, crop)]
        captions = [sample["caption"]]
        if isinstance(self.pairs, SceneDataset):
            captions = self.pairs.wordings(row, self.captions_per_image)
        return {"image": sample["image"], "captions": captions}


def write_shards(
    model: VQRAEModel,
    samples: ImagesToEncode,
    writer: CodeWriter,
    shards: Sequence[int],
    *,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[int]:
    """Encode and write some shards, and yield the number of images after each batch."""
    manifest = writer.manifest
    loader = DataLoader(
        samples,
        # One loader for all shards, so that it reads ahead across them.
        batch_sampler=batches_of(manifest, shards, batch_size),
        collate_fn=_collate,
        pin_memory=model.device.type == "cuda",
        **worker_options(num_workers),
    )
    batches = iter(loader)
    for shard in shards:
        rows = len(manifest.images_of(shard))
        codes = np.empty((rows, *manifest.code_shape), dtype=np.uint16)
        captions: list[list[str]] = []
        while len(captions) < rows:
            images, texts = next(batches)
            first = len(captions)
            captions += texts
            codes[first : len(captions)] = encode_images(model, images).cpu().numpy()
            yield len(texts)
        writer.write(shard, codes, captions)


def batches_of(
    manifest: CodeManifest, shards: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """The images of some shards in batches, each of one shard only."""
    for shard in shards:
        images = manifest.images_of(shard)
        for start in range(0, len(images), batch_size):
            yield list(images[start : start + batch_size])


def _collate(samples: list[dict[str, Any]]) -> tuple[Tensor, list[list[str]]]:
    images = torch.stack([sample["image"] for sample in samples])
    return images, [sample["captions"] for sample in samples]


if __name__ == "__main__":
    run_main(main)
