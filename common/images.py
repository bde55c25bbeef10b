"""Images of any kind: reading them robustly, tensors, and grids."""

import base64
import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from vqrae.common.files import atomic_path, read_bytes

# What a build of Pillow may lack.
_OPTIONAL = {".avif": "avif", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}
_READ = ".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .ppm .pgm"
_NOT_READ = ".heic .heif .jxl .svg .psd .exr .hdr .dng"
IMAGE_SUFFIXES = {
    *_READ.split(),
    *(suffix for suffix, feature in _OPTIONAL.items() if features.check(feature)),
}
OTHER_IMAGES = {*_NOT_READ.split(), *_OPTIONAL} - IMAGE_SUFFIXES
"""Suffixes of images that cannot be read here."""
_ORIENTATION = 0x0112  # the tag of Exif
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LABEL = 60  # characters


def open_image(
    source: str | Path | IO[bytes], *, name: str | None = None, draft: int = 0
) -> Image.Image:
    """Open an image of any size and colour mode as upright RGB; transparency becomes white.

    `source` is a path or the encoded bytes, `name` what errors call it. With `draft`, a JPEG is
    decoded at the smallest of 1/1, 1/2, 1/4, 1/8 of its size whose edges have this number of
    pixels. Raises ValueError when it is not a readable image.
    """
    name = name or str(source)
    data = read_bytes(source) if isinstance(source, str | Path) else source.read()
    # lmms-eval lets a whole process take half an image for a whole one.
    others, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":
                raise ValueError("an EPS file is a program")
            if draft:
                image.draft("RGB", (draft, draft))
            image.load()
            if image.format == "PNG":
                _scale_transparency(image, bit_depth=data[24])  # a byte of its header
            return to_rgb(_upright(image))
    except Exception as error:  # decoders raise anything: struct.error, TypeError, KeyError, …
        raise ValueError(f"{name}: not a readable image ({_reason(error)})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = others


def stored_size(source: IO[bytes], *, name: str) -> tuple[int, int]:
    """Width and height of an encoded image as stored, from its head; errors as `open_image`'s."""
    try:
        with Image.open(source) as image:
            return image.size
    except Exception as error:
        raise ValueError(f"{name}: not a readable image ({_reason(error)})") from error


def _reason(error: Exception) -> object:
    """What went wrong; Pillow's own message holds an address, which differs from run to run."""
    return "unknown format" if isinstance(error, UnidentifiedImageError) else error


def _upright(image: Image.Image) -> Image.Image:
    """The image as its Exif orientation says; other tags, often broken, are not read."""
    try:
        method = _TRANSPOSED.get(image.getexif().get(_ORIENTATION, 1))
    except (ValueError, TypeError, KeyError, SyntaxError, OSError, struct.error):
        method = None
    return image if method is None else image.transpose(method)


def _scale_transparency(image: Image.Image, *, bit_depth: int) -> None:
    """Scale the transparent colour of a PNG to 8 bits, as Pillow scales the pixels alone."""
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "L":
        image.info["transparency"] = key * 255 // (2**bit_depth - 1)
    elif isinstance(key, tuple) and bit_depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any colour mode -> RGB: transparency becomes white, deep and float grey gets 8 bits."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        key = image.info.get("transparency")
        scale = 255 / _white(values, image.mode)
        grey = np.empty(values.shape, np.uint8)
        # By rows: a large image as a whole would take many times its memory.
        for row, scaled in zip(values, grey, strict=True):
            levels = np.nan_to_num(row.astype(np.float32) * scale, posinf=0)
            scaled[:] = levels.clip(0, 255).round()
        image = Image.fromarray(grey)
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _white(values: np.ndarray, mode: str) -> float:
    """The value that means white: for 32 bits a guess, the next usual one above the largest."""
    if mode.startswith("I;16"):
        return 65535
    largest = float(values.max(initial=0, where=np.isfinite(values)))
    usual = (1, 255, 65535) if mode == "F" else (255, 65535)
    return next((white for white in usual if largest <= white), largest)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter edge to `size` (bicubic, antialiased) and cut out the central square."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def image_to_uint8(image: Image.Image) -> Tensor:
    """RGB image -> uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def image_to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> float tensor (3, H, W) in [0, 1]."""
    return image_to_uint8(image).float() / 255


def tensor_to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, clamped and rounded: truncation would make 254 of 0.999."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def tensor_to_image(image: Tensor) -> Image.Image:
    """Image tensor (3, H, W) in [0, 1] -> RGB image."""
    return Image.fromarray(tensor_to_uint8(image).permute(1, 2, 0).cpu().numpy())


def data_uri(image: Image.Image | Tensor) -> str:
    """An image, or an image tensor (3, H, W) in [0, 1], as a PNG that a page can hold."""
    if isinstance(image, Tensor):
        image = tensor_to_image(image)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image atomically; the suffix names the format."""
    path = Path(path)
    with atomic_path(path) as temporary:
        image.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


def image_grid(
    rows: Sequence[Sequence[Tensor]], *, labels: Sequence[str] = (), scale: int = 2, gap: int = 4
) -> Image.Image:
    """Rows of image tensors (3, H, W) on white, enlarged `scale` times, each after its label."""
    labels = [label if len(label) <= LABEL else f"{label[: LABEL - 3]}..." for label in labels]
    height = rows[0][0].shape[-2] * scale
    width = rows[0][0].shape[-1] * scale
    margin = 8 * max((len(label) for label in labels), default=0)
    columns = max(len(row) for row in rows)
    size = (margin + columns * (width + gap) + gap, len(rows) * (height + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if i < len(labels):
            draw.text((gap, top + height // 2 - 6), labels[i], fill="black")
        for j, image in enumerate(row):
            cell = tensor_to_image(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (margin + gap + j * (width + gap), top))
    return canvas


def tile(images: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Equally large images without gaps, row by row; cells that are left are black."""
    width, height = images[0].size
    canvas = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        canvas.paste(image, (i % columns * width, i // columns * height))
    return canvas
