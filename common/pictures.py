"""Reading pictures of any kind, turning them into tensors, and writing picture grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageOps
from torch import Tensor

from vqrae.common.files import atomic_path

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def open_picture(source: str | Path | IO[bytes], *, name: str | None = None) -> Image.Image:
    """Open a picture of any size and colour mode as upright RGB; transparency becomes white.

    Args:
        source: a path, or the encoded bytes as a stream.
        name: what errors call the picture; its path when not given.

    Raises:
        ValueError: when the file is no readable picture, naming it.
    """
    name = name or str(source)
    # lmms-eval lets a whole process take half a picture for a whole one.
    others, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(source) as picture:
            picture.load()
            return to_rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable picture ({error})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = others


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any colour mode to RGB; transparent parts are laid on white, 16-bit grey is scaled to 8 bits."""
    if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(picture, dtype=np.float32) / 65535 * 255
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(canvas, picture).convert("RGB")
    return picture.convert("RGB")


def resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize the shorter edge to `size` (bicubic, antialiased) and take the centre `size` x `size`."""
    if picture.size == (size, size):
        return picture
    return ImageOps.fit(picture, (size, size), method=Image.Resampling.BICUBIC)


def picture_to_uint8(picture: Image.Image) -> Tensor:
    """RGB picture -> uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float tensor (3, H, W) in [0, 1]."""
    return picture_to_uint8(picture).float() / 255


def tensor_to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, clamped and *rounded* (truncation darkens: 0.999 must become 255)."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def tensor_to_picture(image: Tensor) -> Image.Image:
    """Image tensor (3, H, W) in [0, 1] -> RGB picture."""
    return Image.fromarray(tensor_to_uint8(image).permute(1, 2, 0).cpu().numpy())


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture atomically; the suffix names the format."""
    path = Path(path)
    with atomic_path(path) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


def picture_grid(rows: Sequence[Sequence[Tensor]], *, labels: Sequence[str] = (), scale: int = 2, gap: int = 4) -> Image.Image:
    """Lay image tensors (3, H, W) out in rows on white, each `scale` times enlarged, with a label left of each row."""
    height, width = rows[0][0].shape[-2] * scale, rows[0][0].shape[-1] * scale
    margin = 8 * max((len(label) for label in labels), default=0)
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (margin + columns * (width + gap) + gap, len(rows) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if i < len(labels):
            draw.text((gap, top + height // 2 - 6), labels[i], fill="black")
        for j, image in enumerate(row):
            picture = tensor_to_picture(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + gap + j * (width + gap), top))
    return canvas


def tile(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Equally large pictures without gaps, row by row; cells that are left are black."""
    width, height = pictures[0].size
    canvas = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i % columns * width, i // columns * height))
    return canvas
