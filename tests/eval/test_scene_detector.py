"""The scene detector: exact on true scenes, robust on degraded ones, blind to unknown shapes."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import fft, ndimage

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.scene import (
    COLOR_NAMES,
    COLOR_VALUES,
    COLORS,
    Background,
    Scene,
    SceneObject,
    render,
)
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.geneval.rules import Detection
from vqrae.eval.geneval.scene_detector import SceneColorClassifier, SceneDetector

SETS = ("shapes", "emoji")


@functools.cache
def detector(sprites: str) -> SceneDetector:
    return SceneDetector(load_sprites(sprites))


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 255) + 0.5).astype(np.uint8))


def blurred(pixels: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(pixels.astype(float), (1, 1, 0))


def noisy(pixels: np.ndarray) -> np.ndarray:
    return pixels + np.random.default_rng(0).normal(0, 0.05 * 255, pixels.shape)


def halved(pixels: np.ndarray) -> np.ndarray:
    small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((64, 64), Image.Resampling.BILINEAR))


def quantized(pixels: np.ndarray) -> np.ndarray:
    """8 x 8 block DCT with coarse steps, about 31 dB."""
    blocks = fft.dctn(pixels.astype(float).reshape(8, 8, 8, 8, 3), axes=(1, 3), norm="ortho")
    steps = 16 * (1 + np.arange(8)[:, None, None, None] + np.arange(8)[:, None])
    coarse = np.round(blocks / steps) * steps
    return fft.idctn(coarse, axes=(1, 3), norm="ortho").reshape(64, 64, 3)


def seen(sprites: str, image: Image.Image) -> list[tuple[str, str, Detection]]:
    """Name, colour and detection of all things above the threshold, in order."""
    found = [d for d in detector(sprites).detect(image) if d.score > detector(sprites).threshold]
    colors = SceneColorClassifier().classify(image, found, "")
    rows = [(d.name, color, d) for d, color in zip(found, colors, strict=True)]
    return sorted(rows, key=lambda row: row[:2])


def hits(sprites: str, scene: Scene, image: Image.Image) -> tuple[int, int]:
    """Objects that were found with name, colour and place; things found that are none of them."""
    names, left, found = load_sprites(sprites).names, list(scene.objects), seen(sprites, image)
    for name, color, detection in found:
        x0, y0, x1, y1 = detection.box
        for item in left:
            x, y = item.center
            near = max(abs((x0 + x1) / 2 - x), abs((y0 + y1) / 2 - y)) < 4
            if near and (name, color) == (names[item.name], COLOR_NAMES[item.color]):
                left.remove(item)
                break
    right = len(scene.objects) - len(left)
    return right, len(found) - right


@pytest.mark.parametrize("sprites", SETS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_true_scenes_are_read_without_error(sprites: str, split: str) -> None:
    scenes = SceneDataset(split, sprites=sprites)
    for i in range(30):
        found = hits(sprites, scenes.scene(i), Image.fromarray(scenes.pixels(i)))
        assert found == (len(scenes.scene(i).objects), 0), (split, i)


@pytest.mark.parametrize("degrade", [blurred, noisy, halved, quantized])
@pytest.mark.parametrize("sprites", SETS)
def test_degraded_scenes_are_still_read(
    sprites: str, degrade: Callable[[np.ndarray], np.ndarray]
) -> None:
    scenes, counts = SceneDataset("validation", sprites=sprites), []
    for i in range(20):
        found = hits(sprites, scenes.scene(i), to_image(degrade(scenes.pixels(i))))
        counts.append((len(scenes.scene(i).objects), *found))
    objects, right, extra = np.sum(counts, axis=0)
    assert right >= 0.95 * objects
    assert extra <= 0.02 * objects


@pytest.mark.parametrize("sprites", SETS)
@pytest.mark.parametrize("color", list(COLORS)[::3])
def test_every_name_on_every_background(sprites: str, color: str) -> None:
    names = load_sprites(sprites).names
    for number, name in enumerate(names):
        strength, period = 1.0 if number % 2 else -1.0, 16 if number % 3 else 8
        item = SceneObject(number, COLOR_NAMES.index(color), 20, 17, 25)
        scene = Scene((item,), Background(number % 5, "dots", strength, 0.0, period))
        image = Image.fromarray(render(scene, load_sprites(sprites)))
        [(found, found_color, detection)] = seen(sprites, image)
        assert (found, found_color) == (name, color)
        x0, y0, x1, y1 = detection.box
        assert 16 <= x0 < x1 <= 38
        assert 24 <= y0 < y1 <= 46


def paint(mask: np.ndarray) -> Image.Image:
    """A blue thing of this coverage (64, 64) on grey."""
    return to_image(255 * (0.56 + mask[..., None] * (np.array(COLORS["blue"]) - 0.56)))


NAMELESS = {
    "bar": [(160, 160, 352, 216)],
    "letter L": [(160, 160, 224, 352), (160, 288, 352, 352)],
    "oblong": [(160, 160, 352, 280)],
    "speck": [(160, 160, 192, 192)],
    "whole image": [(0, 0, 512, 512)],
    "flat ellipse": [(160, 160, 352, 250)],
}


@pytest.mark.parametrize("shape", NAMELESS)
def test_what_is_not_a_sprite_has_no_name(shape: str) -> None:
    canvas = Image.new("L", (512, 512))
    pen = ImageDraw.Draw(canvas)
    for box in NAMELESS[shape]:
        (pen.ellipse if "ellipse" in shape else pen.rectangle)(box, fill=255)
    small = canvas.resize((64, 64), Image.Resampling.BOX)
    assert seen("shapes", paint(np.asarray(small, dtype=np.float32) / 255)) == []


def test_touching_things_of_two_colours_are_two_and_a_thing_of_two_colours_none() -> None:
    sprites, palette = load_sprites("shapes"), dict(zip(COLOR_NAMES, COLOR_VALUES, strict=True))
    pixels = np.full((64, 64, 3), 0.56, dtype=np.float32)
    for name, color, x in (("square", "red", 12), ("circle", "blue", 31)):
        region = pixels[20:40, x : x + 20]
        region += sprites.draw(name, 20)[0][..., None] * (palette[color] - region)
    found = [row[:2] for row in seen("shapes", to_image(pixels * 255))]
    assert found == [("circle", "blue"), ("square", "red")]
    halves = np.concatenate([np.full((12, 24, 3), palette[color]) for color in ("red", "blue")])
    pixels = np.full((64, 64, 3), 0.56, dtype=np.float32)
    pixels[20:44, 20:44] += sprites.draw("circle", 24)[0][..., None] * (halves - 0.56)
    assert seen("shapes", to_image(pixels * 255)) == []
