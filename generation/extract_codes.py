"""Pictures and captions -> code shards, once, so that training the generator never runs the tokenizer.

    python -m vqrae.generation.extract_codes tiny tokenizer=RUN source=scenes size=20000 output_dir=CODES
    torchrun --nproc-per-node=8 -m vqrae.generation.extract_codes qwen3_0_6b tokenizer=RUN source='DIR/*.tar' output_dir=CODES

Every process takes every n-th shard. The same command skips the shards that are there. Codes are computed in fp32,
exactly as the tokenizer does: under autocast near neighbours in the codebook would change places.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from vqrae.common.checkpoints import local_model
from vqrae.common.distributed import world_size
from vqrae.common.files import weights_fingerprint
from vqrae.common.run import format_duration
from vqrae.data.code_shards import CodeManifest, CodeWriter
from vqrae.data.scenes import SceneDataset, caption, render
from vqrae.data.sources import open_pairs
from vqrae.generation.config import ExtractionConfig, read_config
from vqrae.tokenizer import VQRAEModel

_REPORT_SECONDS = 5.0


class CaptionedPictures(Dataset):
    """A pair source as {"image": uint8 (3, H, W), "captions": list}; scenes can be worded several times.

    Raises:
        ValueError: when several captions are asked of a source of files.
    """

    def __init__(self, pairs: Dataset, captions_per_image: int) -> None:
        if captions_per_image != 1 and not isinstance(pairs, SceneDataset):
            raise ValueError(f"got captions_per_image={captions_per_image}, expected 1: sources of files carry one caption")
        self.pairs, self.captions_per_image = pairs, captions_per_image

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not isinstance(self.pairs, SceneDataset):
            sample = self.pairs[index]
            return {"image": sample["image"], "captions": [sample["caption"]]}
        scenes = self.pairs
        scene = scenes.scene(index)
        image = torch.from_numpy(render(scene, scenes.sprites, scenes.sampler.image_size)).permute(2, 0, 1)
        wordings = (np.random.default_rng([scenes.seed, index, draw]) for draw in range(self.captions_per_image))
        return {"image": image, "captions": [caption(scene, scenes.sprites.names, rng) for rng in wordings]}


def _collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, list[list[str]]]:
    return torch.stack([sample["image"] for sample in samples]), [sample["captions"] for sample in samples]


@torch.inference_mode()
def _encode(model: VQRAEModel, batches: DataLoader) -> Iterator[tuple[np.ndarray, list[list[str]]]]:
    """Codes (B, N) and captions of each batch."""
    for images, captions in batches:
        codes = model.encode(images.to(model.device).float() / 255)
        if codes.ndim != 2:
            raise ValueError(f"got codes of shape {tuple(codes.shape)}, expected (B, N): set a tokenizer with one codebook")
        yield codes.cpu().numpy(), captions


def extract(config: ExtractionConfig) -> None:
    """Write this process's share of a code set; shards that are complete are kept."""
    rank, processes = int(os.environ.get("RANK", "0")), world_size()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    folder = local_model(config.tokenizer)
    model = VQRAEModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    pairs = open_pairs(
        config.source, image_size=model.config.image_size, size=config.size, split=config.split, seed=config.seed
    )
    pictures = CaptionedPictures(pairs, config.captions_per_image)
    manifest = CodeManifest(
        tokenizer_fingerprint=weights_fingerprint(folder),
        codebook_size=model.config.codebook_size,
        grid_size=model.config.grid_size,
        source=f"{config.source} ({config.split}, seed {config.seed})",
        num_pictures=len(pictures),
        shard_size=config.shard_size,
        captions_per_image=config.captions_per_image,
    )
    writer = CodeWriter(config.output_dir, manifest)
    missing = [shard for shard in range(rank, manifest.num_shards, processes) if not writer.is_complete(shard)]
    total, done = sum(len(manifest.pictures_of(shard)) for shard in missing), 0
    started = reported = time.monotonic()
    for shard in missing:
        subset = Subset(pictures, manifest.pictures_of(shard))
        loader = DataLoader(subset, config.batch_size, num_workers=config.num_workers, collate_fn=_collate)
        codes, captions = [], []
        for batch_codes, batch_captions in _encode(model, loader):
            codes.append(batch_codes)
            captions += batch_captions
            done += len(batch_codes)
            now = time.monotonic()
            if rank == 0 and (now - reported > _REPORT_SECONDS or done == total):
                speed, reported = done / (now - started), now
                left = format_duration((total - done) / speed)
                print(f"codes {done}/{total}  {speed * processes:.0f} images/s  {left} left", flush=True)
        writer.write(shard, np.concatenate(codes), captions)
    if rank == 0:
        print(f"finished: {config.output_dir} ({manifest.num_pictures} pictures x {manifest.num_codes} codes)", flush=True)


def main(argv: list[str] | None = None) -> None:
    extract(read_config(argv, "extraction"))


if __name__ == "__main__":
    main()
