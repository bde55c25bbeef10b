"""Code extraction from WebDataset tars to verified shards, beside the bare encoder on images that are already tensors.

The tokenizer has a ViT-B encoder at 256 px, 256 codes out of 16,384 in 1536 dimensions; the published encoders are three to
five times larger, so that loading and writing weigh less there. Everything runs in one process, without loader workers: on one
core they would only take turns with the encoder.
"""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqrae.benchmarks.harness import Row, compare
from vqrae.data.code_shards import CodeDataset, CodeManifest, CodeWriter
from vqrae.data.sources import open_pairs
from vqrae.generation.encoding import encode_images
from vqrae.generation.extract_codes import CaptionedImages, write_shards
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 256,
    "patch_size": 16,
    "vision_use_head": False,
}
TOKENIZER = {"encoder_config": ENCODER, "codebook_size": 16_384, "codebook_dim": 1536}
IMAGES, SIZE, BATCH_SIZE = 16, (512, 384), 8
CAPTION = " ".join(["word"] * 80)
PUBLISHED_CODES = 1024


def write_tar(path: Path, count: int) -> None:
    """Photograph-like JPEGs with captions of 80 words, in BLIP3-o's layout."""
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            coarse = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(
                stream, "JPEG", quality=90
            )
            for suffix, data in (("jpg", stream.getvalue()), ("txt", CAPTION.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def run(
    tokenizer: dict[str, Any] = TOKENIZER,
    images: int = IMAGES,
    batch_size: int = BATCH_SIZE,
    repeats: int = 3,
) -> list[Row]:
    """Images per second, and bytes on disk beside a JSON line of integers.

    Raises:
        AssertionError: when the shards do not hold the bare encoder's codes.
    """
    torch.manual_seed(0)
    model = VQRAEModel(VQRAEConfig(**tokenizer)).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "pairs.tar"
        write_tar(tar, images)
        size = model.config.image_size
        source = CaptionedImages(open_pairs(str(tar), image_size=size, split="all"))
        decoded = torch.stack([source[i]["image"] for i in range(images)])
        manifest = CodeManifest(
            tokenizer_fingerprint="0" * 64,
            codebook_size=model.config.codebook_size,
            grid_size=model.config.grid_size,
            source=str(tar),
            num_images=images,
            shard_size=-(-images // 2),
        )
        writer = CodeWriter(Path(folder) / "codes", manifest)

        def extract() -> None:
            opened = CaptionedImages(open_pairs(str(tar), image_size=size, split="all"))
            list(
                write_shards(
                    model, opened, writer, range(manifest.num_shards), batch_size=batch_size
                )
            )

        def bare() -> torch.Tensor:
            return torch.cat([encode_images(model, batch) for batch in decoded.split(batch_size)])

        extract()
        codes = CodeDataset(writer.folder)
        assert torch.equal(torch.stack([codes[i]["codes"] for i in range(images)]), bare())
        seconds = compare(extract, bare, repeats)
    ours, reference = (images / spent for spent in seconds)
    case = f"extraction beside the bare encoder, {size} px"
    stored, lines = disk_bytes()
    return [
        Row(case, ours, reference, unit="images/s", higher_is_better=True),
        Row(f"{PUBLISHED_CODES} codes on disk, beside a JSON line", stored, lines, unit="bytes"),
    ]


def disk_bytes(rows: int = 1000) -> tuple[float, float]:
    """Bytes of 1024 codes of 16,384 in a shard without its captions, and in a JSON line."""
    codes = np.random.default_rng(0).integers(0, 16_384, (rows, PUBLISHED_CODES))
    manifest = CodeManifest(
        tokenizer_fingerprint="0" * 64,
        codebook_size=16_384,
        grid_size=32,
        source="random",
        num_images=rows,
        shard_size=rows,
    )
    with tempfile.TemporaryDirectory() as folder:
        CodeWriter(folder, manifest).write(0, codes, [[CAPTION]] * rows)
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.npy"))
    return stored / rows, sum(len(json.dumps({"tokens": row})) + 1 for row in codes.tolist()) / rows
