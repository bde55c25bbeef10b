"""Tokenizers next to each other, and to what anyone knows: JPEG, WebP, k-means of raw patches.

    python -m vqrae.eval.reconstruction.compare \
        models=[runs/quickstart/tokenizer,runs/photographs/tokenizer] \
        data=[runs/photographs/test,scenes] patches=runs/photographs/train output=comparison.json

All store an image of `image_size` in as many bits. A model of smaller images gets the tiles of one;
scenes and emoji are drawn at the smallest size and joined, so that each model sees its own kind.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqrae.common import cli
from vqrae.common.checkpoints import resolve_model
from vqrae.common.config import check_range
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, write_json, write_text
from vqrae.common.images import image_grid, image_to_tensor, save_image, tensor_to_image
from vqrae.common.run import quiet_libraries
from vqrae.data.sources import open_images, source_kind
from vqrae.eval.reconstruction.frechet import FrechetMetric
from vqrae.eval.reconstruction.metrics import ReconstructionMetrics
from vqrae.eval.reconstruction.networks import OriginalEncoder, original_tokenizer
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.quantizers.kmeans import kmeans
from vqrae.tokenizer.quantizers.search import nearest_codes

EXAMPLES = 6  # images of the grid
Method = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, H) in [0, 1] -> their copies and their codes (M,); a file format has one."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Reconstruct the same images by several tokenizers, file formats and k-means of patches."""

    models: tuple[str, ...]
    """Tokenizers. The first sets the number of bits, and its stage 1 the Fréchet distance's
    encoder."""
    data: tuple[str, ...]
    """Sources of images; folders are taken whole, the others by their validation split."""
    patches: str
    """Source of the raw patches for k-means."""
    output: str
    """JSON file of the scores; tables and a grid of examples are written next to it."""
    image_size: int = 128
    """Pixels of a side."""
    num_images: int = 64
    """Images of each source, the first ones."""

    def __post_init__(self) -> None:
        check_range(self, "image_size", "num_images", low=1)


def retile(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, H) cut into k k tiles each (B k k, 3, size, size), or k k joined to one."""
    side = images.shape[-1]
    if max(side, size) % min(side, size):
        raise ValueError(f"got images of {side} and {size} pixels, expected a multiple")
    if side >= size:
        return rearrange(images, "b c (i h) (j w) -> (b i j) c h w", h=size, w=size)
    k = size // side
    return rearrange(images, "(b i j) c h w -> b c (i h) (j w)", i=k, j=k)


def by_tokenizer(model: VQRAEModel) -> Method:
    """Encode and decode, 32 tiles of the model's size at a time."""

    def copy(images: Tensor) -> tuple[Tensor, Tensor]:
        tiles = retile(images, model.config.image_size)
        codes = torch.cat([model.encode(part) for part in tiles.split(32)])
        copies = torch.cat([model.decode(part) for part in codes.split(32)])
        return retile(copies, images.shape[-1]), codes

    return copy


def by_patches(centers: Tensor, size: int) -> Method:
    """Replace each raw patch by the nearest of the centres (K, 3 * size * size)."""

    def copy(images: Tensor) -> tuple[Tensor, Tensor]:
        patches = retile(images, size)
        codes = nearest_codes(patches.flatten(1), centers)
        return retile(centers[codes].view_as(patches), images.shape[-1]), codes

    return copy


def by_format(name: str, num_bytes: int) -> Method:
    """Store each image in that many bytes, at the quality and size that give the least error.

    Heads, tables and containers, which many images could share, are not counted.
    """

    def copy_one(image: Tensor) -> Tensor:
        whole = tensor_to_image(image)
        copies = [torch.full_like(image, 0.5)]
        for scale in (1, 2, 4):
            small = whole.resize((whole.width // scale,) * 2, Image.Resampling.BOX)
            for quality in range(95):
                stream = io.BytesIO()
                small.save(stream, format=name, quality=quality)
                data = stream.getvalue()
                head = data.rindex(b"\xff\xda") + 14 if name == "JPEG" else 20
                if len(data) - head > num_bytes:
                    break
                decoded = Image.open(stream).resize(whole.size, Image.Resampling.BICUBIC)
                copies.append(image_to_tensor(decoded.convert("RGB")))
        return min(copies, key=lambda copy: (copy - image).square().mean().item())

    return lambda images: (torch.stack(list(map(copy_one, images))), torch.tensor([0]))


def load_images(source: str, image_size: int, tile: int, num_images: int | None = None) -> Tensor:
    """Images (B, 3, H, H) in [0, 1] of a source; drawn ones are joined from tiles."""
    size = tile if source_kind(source) in ("scenes", "emoji") else image_size
    joined = (image_size // size) ** 2
    split = "all" if source_kind(source) == "folder" else "validation"
    count = num_images and num_images * joined
    dataset = open_images(source, image_size=size, size=count, split=split)
    whole = range(len(dataset) // joined * joined)
    stored = torch.stack([dataset[i]["image"] for i in whole])
    return retile(stored.float() / 255, image_size)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ComparisonConfig, argv)
    quiet_libraries()
    encoder = OriginalEncoder(original_tokenizer(config.models[0]))
    folders = map(resolve_model, config.models)
    models = [VQRAEModel.from_pretrained(folder).eval() for folder in folders]
    first, tile = models[0].config, min(model.config.image_size for model in models)
    raw = retile(load_images(config.patches, config.image_size, tile), first.patch_size)
    tokens = (config.image_size // first.patch_size) ** 2 * first.num_codebooks
    num_bytes = math.ceil(tokens * math.log2(first.codebook_size) / 8)
    methods = dict(zip(config.models, map(by_tokenizer, models), strict=True))
    centers = kmeans(raw.flatten(1), first.codebook_size)
    methods["k-means of patches"] = by_patches(centers, first.patch_size)
    methods |= {name: by_format(name, num_bytes) for name in ("JPEG", "WEBP")}

    scores: dict[str, dict[str, dict]] = {}
    lines = [f"# {config.image_size} x {config.image_size} pixels in {num_bytes} bytes"]
    for source in config.data:
        images = load_images(source, config.image_size, tile, config.num_images)
        spread = torch.linspace(0, len(images) - 1, min(EXAMPLES, len(images))).long()
        examples = [list(images[spread])]
        found, rows = {}, []
        for name, method in methods.items():
            copies, codes = method(images)
            metrics = ReconstructionMetrics(first.codebook_size, frechet=[FrechetMetric(encoder)])
            metrics.update(images, copies, codes)
            found[name] = values = metrics.compute()
            examples.append(list(copies[spread]))
            psnr = f"{values['psnr']:.1f} ± {values['psnr_interval']:.1f}"
            usage = f"{values['codebook_usage']:.0%}" if codes.numel() > 1 else "-"
            distance = f"{values['frechet_encoder']:.3g}"
            rows.append([name, psnr, f"{values['ssim']:.2f}", distance, usage])
        scores[source] = found
        lines += ["", f"`{source}`, {len(images)} images", ""]
        lines += markdown_table(("method", "PSNR, dB", "SSIM", "Fréchet", "codes used"), rows)
        if len(scores) == 1:
            grid = image_grid(examples, labels=["original", *methods], scale=1)
            save_image(grid, Path(config.output).with_suffix(".png"))
    write_json(config.output, {"settings": vars(config), "bytes": num_bytes, **scores})
    write_text(Path(config.output).with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines), f"\n->  {config.output}")


if __name__ == "__main__":
    run_main(main)
