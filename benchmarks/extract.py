"""Code extraction from WebDataset tars to verified shards vs the bare encoder on tensors.

The tokenizer has a ViT-B encoder at 256 px, 256 codes out of 16,384 in 1536 dimensions; the
published encoders are three to five times larger, so that loading and writing weigh less there. All
in one process without loader workers: on one core they would only take turns with the encoder.
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
from torch import Tensor

from benchmarks.harness import Row, time_row
from vqrae.data.code_shards import CodeDataset, CodeManifest, CodeWriter
from vqrae.data.sources import open_pairs
from vqrae.generation.data import encode_images
from vqrae.generation.extract_codes import ImagesToEncode, write_shards
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

ENCODER = {"model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072}
ENCODER |= {"num_hidden_layers": 12, "num_attention_heads": 12, "vision_use_head": False}
ENCODER |= {"image_size": 256, "patch_size": 16}
TOKENIZER = {"encoder_config": ENCODER, "codebook_size": 16_384, "codebook_dim": 1536}
CAPTION = " ".join(["word"] * 80)  # as long as a dense caption


def write_tar(path: Path, count: int) -> None:
    """Photograph-like JPEGs of 512 x 384 with captions of 80 words, in BLIP3-o's layout."""
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            coarse = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            photograph = Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC)
            stream = io.BytesIO()
            photograph.save(stream, "JPEG", quality=90)
            for suffix, data in (("jpg", stream.getvalue()), ("txt", CAPTION.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def manifest(codebook_size: int, grid_size: int, num_images: int, shard_size: int) -> CodeManifest:
    shape: dict[str, Any] = {"codebook_size": codebook_size, "grid_size": grid_size}
    shape |= {"num_images": num_images, "shard_size": shard_size}
    return CodeManifest(tokenizer_fingerprint="0" * 64, source="random", **shape)


def run(
    tokenizer: dict[str, Any] = TOKENIZER, images: int = 16, batch_size: int = 8, repeats: int = 3
) -> list[Row]:
    torch.manual_seed(0)
    model = VQRAEModel(VQRAEConfig(**tokenizer)).eval().requires_grad_(False)
    size = model.config.image_size
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "pairs.tar"
        write_tar(tar, images)
        kind = manifest(model.config.codebook_size, model.config.grid_size, images, -(-images // 2))
        writer = CodeWriter(Path(folder) / "codes", kind)

        def source() -> ImagesToEncode:
            return ImagesToEncode(open_pairs(str(tar), image_size=size, split="all"))

        def extract() -> None:
            shards = range(kind.num_shards)
            list(write_shards(model, source(), writer, shards, batch_size=batch_size))

        opened = source()
        decoded = torch.stack([opened[i]["image"] for i in range(images)])

        def bare() -> Tensor:
            return torch.cat([encode_images(model, batch) for batch in decoded.split(batch_size)])

        extract()
        stored = CodeDataset(writer.folder)
        codes = torch.stack([stored[i]["codes"] for i in range(images)])
        assert torch.equal(codes, bare()), "the shards do not hold the encoder's codes"
        case = f"extraction vs the bare encoder, {size} px"
        rate = time_row(case, extract, bare, repeats=repeats, work=images, unit="images/s")
        return [rate, disk_row()]


def disk_row(images: int = 1000, grid_size: int = 32) -> Row:
    """Bytes of an image's 1,024 codes in a shard, without its captions, and in a JSON line."""
    codes = np.random.default_rng(0).integers(0, 16_384, (images, grid_size**2))
    with tempfile.TemporaryDirectory() as folder:
        kind = manifest(16_384, grid_size, images, images)
        CodeWriter(folder, kind).write(0, codes, [[CAPTION]] * images)
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.npy")) / images
    lines = sum(len(json.dumps({"tokens": row})) + 1 for row in codes.tolist()) / images
    case = f"{grid_size**2} codes on disk vs a JSON line"
    return Row(case, stored, lines, "bytes", lines / stored)
