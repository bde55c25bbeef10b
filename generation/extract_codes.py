"""Images and captions -> code shards, once, so that training the generator never runs the tokenizer.

    python -m vqrae.generation.extract_codes tiny tokenizer=RUN source=scenes size=20000 output_dir=CODES
    torchrun --nproc-per-node=8 -m vqrae.generation.extract_codes qwen3_0_6b tokenizer=RUN source='DIR/*.tar' output_dir=CODES

Every process takes every n-th shard. The same command skips the shards that are there; `vqrae check-data CODES` reads all of
them again.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vqrae.common.checkpoints import local_model
from vqrae.common.distributed import worker_options, world_size
from vqrae.common.errors import run_main
from vqrae.common.files import weights_fingerprint
from vqrae.common.run import format_duration
from vqrae.data.code_shards import CodeManifest, CodeWriter
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import wording
from vqrae.data.scenes.scene import render
from vqrae.data.sources import open_pairs
from vqrae.data.stream import Draw
from vqrae.generation.config import ExtractionConfig, read_config
from vqrae.generation.encoding import encode_images, load_encoder
from vqrae.tokenizer.modeling import VQRAEModel

_REPORT_SECONDS = 5.0


class CaptionedImages(Dataset):
    """A pair source as {"image": uint8 (3, H, W), "captions": list}.

    Args:
        captions_per_image: wordings of each scene; any other source has one caption for each image.
        crops_per_image: times that the source is gone through, with other random crops each time.

    Raises:
        ValueError: when several crops are asked of scenes.
    """

    def __init__(self, pairs: Any, captions_per_image: int = 1, crops_per_image: int = 1) -> None:
        if crops_per_image != 1 and isinstance(pairs, SceneDataset):
            raise ValueError(
                f"got crops_per_image={crops_per_image}, expected 1: scenes are square, and endless: raise size"
            )
        self.pairs, self.crops_per_image = pairs, crops_per_image
        self.captions_per_image = captions_per_image if isinstance(pairs, SceneDataset) else 1

    def __len__(self) -> int:
        return len(self.pairs) * self.crops_per_image

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not isinstance(self.pairs, SceneDataset):
            crop, row = divmod(index, len(self.pairs))
            sample = self.pairs[Draw(row, crop)]
            return {"image": sample["image"], "captions": [sample["caption"]]}
        scenes = self.pairs
        scene = scenes.scene(index)
        size = scenes.sampler.image_size
        image = torch.from_numpy(render(scene, scenes.sprites, size)).permute(2, 0, 1)
        wordings = (
            np.random.default_rng([scenes.seed, index, draw])
            for draw in range(self.captions_per_image)
        )
        return {
            "image": image,
            "captions": [wording(scene, scenes.sprites.names, rng, size) for rng in wordings],
        }


def _collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, list[list[str]]]:
    return torch.stack([sample["image"] for sample in samples]), [
        sample["captions"] for sample in samples
    ]


class ShardBatches(Sampler[list[int]]):
    """The images of some shards in batches, each of one shard only: one loader then reads ahead across shards."""

    def __init__(self, manifest: CodeManifest, shards: Sequence[int], batch_size: int) -> None:
        self.manifest, self.shards, self.batch_size = manifest, shards, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self.shards:
            images = self.manifest.images_of(shard)
            yield from (
                list(images[i : i + self.batch_size])
                for i in range(0, len(images), self.batch_size)
            )


def write_shards(
    model: VQRAEModel,
    samples: CaptionedImages,
    writer: CodeWriter,
    shards: Sequence[int],
    *,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[int]:
    """Encode and write some shards of a code set, and yield the number of images of each batch when it is encoded."""
    batches = ShardBatches(writer.manifest, shards, batch_size)
    on_gpu = model.device.type == "cuda"
    workers = worker_options(num_workers)
    loader = DataLoader(
        samples, batch_sampler=batches, collate_fn=_collate, pin_memory=on_gpu, **workers
    )
    loaded = iter(loader)
    for shard in shards:
        rows = len(writer.manifest.images_of(shard))
        codes, captions = (
            np.empty((rows, writer.manifest.num_codes), dtype=np.uint16),
            list[list[str]](),
        )
        while len(captions) < rows:
            images, texts = next(loaded)
            codes[len(captions) : len(captions) + len(texts)] = (
                encode_images(model, images).cpu().numpy()
            )
            captions += texts
            yield len(texts)
        writer.write(shard, codes, captions)


def extract(config: ExtractionConfig) -> None:
    """Write this process's share of a code set; shards that are complete are kept."""
    rank, processes = int(os.environ.get("RANK", "0")), world_size()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    folder = local_model(config.tokenizer)
    model = load_encoder(folder).to(device)
    pairs = open_pairs(
        config.source,
        image_size=model.config.image_size,
        size=config.size,
        split=config.split,
        crop=config.crop,
        seed=config.seed,
    )
    images = CaptionedImages(pairs, config.captions_per_image, config.crops_per_image)
    manifest = CodeManifest(
        tokenizer_fingerprint=weights_fingerprint(folder),
        codebook_size=model.config.codebook_size,
        grid_size=model.config.grid_size,
        source=f"{config.source} ({config.split}, seed {config.seed})",
        num_images=len(images),
        shard_size=config.shard_size,
        captions_per_image=images.captions_per_image,
        crop=config.crop,
        crops_per_image=config.crops_per_image,
    )
    writer = CodeWriter(config.output_dir, manifest)
    missing = [
        shard
        for shard in range(rank, manifest.num_shards, processes)
        if not writer.is_complete(shard)
    ]
    total, done = sum(len(manifest.images_of(shard)) for shard in missing), 0
    started = reported = time.monotonic()
    for count in write_shards(
        model, images, writer, missing, batch_size=config.batch_size, num_workers=config.num_workers
    ):
        done += count
        now = time.monotonic()
        if rank == 0 and (now - reported > _REPORT_SECONDS or done == total):
            speed, reported = done / (now - started), now
            left = format_duration((total - done) / speed)
            print(
                f"codes {done}/{total}  {speed * processes:.0f} images/s  {left} left", flush=True
            )
    if all(
        writer.is_complete(shard) for shard in range(manifest.num_shards)
    ):  # the process that ends last says so
        print(
            f"finished: {config.output_dir} ({manifest.num_images} images x {manifest.num_codes} codes)",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    extract(read_config(argv, "extraction"))


if __name__ == "__main__":
    run_main(main)
