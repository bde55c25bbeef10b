"""The scene detector: exact on true scenes, robust on degraded ones, blind to what has no recognisable shape."""

import functools

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


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    return (pixels.clip(0, 255) + 0.5).astype(np.uint8)


def blurred(pixels: np.ndarray) -> np.ndarray:
    return to_bytes(ndimage.gaussian_filter(pixels.astype(float), (1, 1, 0)))


def noisy(pixels: np.ndarray) -> np.ndarray:
    return to_bytes(pixels + np.random.default_rng(0).normal(0, 0.05 * 255, pixels.shape))


def halved(pixels: np.ndarray) -> np.ndarray:
    small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((64, 64), Image.Resampling.BILINEAR))


def quantised(pixels: np.ndarray) -> np.ndarray:
    """8 x 8 block DCT with coarse steps, about 31 dB."""
    blocks = fft.dctn(pixels.astype(float).reshape(8, 8, 8, 8, 3), axes=(1, 3), norm="ortho")
    steps = 16 * (1 + np.arange(8)[:, None, None, None] + np.arange(8)[:, None])
    return to_bytes(
        fft.idctn(np.round(blocks / steps) * steps, axes=(1, 3), norm="ortho").reshape(64, 64, 3)
    )


def seen(sprites: str, image: Image.Image) -> list[tuple[str, str, Detection]]:
    """Name, colour and detection of all things above the threshold."""
    found = [d for d in detector(sprites).detect(image) if d.score > detector(sprites).threshold]
    colors = SceneColorClassifier().classify(image, found, "")
    return [(d.name, color, d) for d, color in zip(found, colors, strict=True)]


def hits(sprites: str, scene: Scene, image: Image.Image) -> tuple[int, int]:
    """Objects that were found with name, colour and place; things found that are none of them."""
    left, right = list(scene.objects), 0
    found = seen(sprites, image)
    for name, color, detection in found:
        x0, y0, x1, y1 = detection.box
        for item in left:
            near = max(abs((x0 + x1) / 2 - item.center[0]), abs((y0 + y1) / 2 - item.center[1])) < 4
            if near and (name, color) == (
                load_sprites(sprites).names[item.name],
                COLOR_NAMES[item.color],
            ):
                left.remove(item)
                right += 1
                break
    return right, len(found) - right


@pytest.mark.parametrize("sprites", SETS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_true_scenes_are_read_without_error(sprites: str, split: str) -> None:
    scenes = SceneDataset(split, sprites=sprites)
    for i in range(60):
        scene = scenes.scene(i)
        assert hits(sprites, scene, Image.fromarray(scenes.pixels(i))) == (len(scene.objects), 0), (
            split,
            i,
        )


@pytest.mark.parametrize("degrade", [blurred, noisy, halved, quantised])
@pytest.mark.parametrize("sprites", SETS)
def test_degraded_scenes_are_still_read(sprites: str, degrade) -> None:
    scenes, objects, right, extra = SceneDataset("validation", sprites=sprites), 0, 0, 0
    for i in range(30):
        found, more = hits(sprites, scenes.scene(i), Image.fromarray(degrade(scenes.pixels(i))))
        objects, right, extra = objects + len(scenes.scene(i).objects), right + found, extra + more
    assert right >= 0.95 * objects
    assert extra <= 0.02 * objects


@pytest.mark.parametrize("sprites", SETS)
@pytest.mark.parametrize("color", COLORS)
def test_every_name_in_every_colour_on_every_background(sprites: str, color: str) -> None:
    names = load_sprites(sprites).names
    for number, name in enumerate(names):
        background = Background(
            number % 5, "dots", 1.0 if number % 2 else -1.0, 0.0, 16 if number % 3 else 8
        )
        scene = Scene((SceneObject(number, COLOR_NAMES.index(color), 20, 17, 25),), background)
        [(found, found_color, detection)] = seen(
            sprites, Image.fromarray(render(scene, load_sprites(sprites)))
        )
        assert (found, found_color) == (name, color)
        x0, y0, x1, y1 = detection.box
        assert 16 <= x0 < x1 <= 38
        assert 24 <= y0 < y1 <= 46


def test_images_of_other_sizes() -> None:
    scenes = SceneDataset("validation", image_size=256)
    image = Image.fromarray(scenes.pixels(3))
    found = sorted((name, color) for name, color, _ in seen("shapes", image))
    names = scenes.sprites.names
    assert found == sorted((names[o.name], COLOR_NAMES[o.color]) for o in scenes.scene(3).objects)
    boxes = [detection.box for _, _, detection in seen("shapes", image)]
    assert max(edge for box in boxes for edge in box) > 64  # in pixels of the image


def draw_mask(draw_on) -> np.ndarray:
    """Coverage (64, 64) of something drawn eight times larger."""
    canvas = Image.new("L", (512, 512))
    draw_on(ImageDraw.Draw(canvas))
    return np.asarray(canvas.resize((64, 64), Image.Resampling.BOX), dtype=np.float32) / 255


def paint(mask: np.ndarray, color: str = "blue") -> Image.Image:
    pixels = 0.56 + mask[..., None] * (np.array(COLORS[color]) - 0.56)
    return Image.fromarray(to_bytes(pixels * 255))


NAMELESS = {
    "bar": lambda d: d.rectangle((160, 160, 352, 216), fill=255),
    "flat ellipse": lambda d: d.ellipse((160, 160, 352, 250), fill=255),
    "half disc": lambda d: d.pieslice((160, 160, 352, 352), 180, 360, fill=255),
    "letter L": lambda d: (
        d.rectangle((160, 160, 224, 352), fill=255),
        d.rectangle((160, 288, 352, 352), fill=255),
    ),
    "oblong": lambda d: d.rectangle((160, 160, 352, 280), fill=255),
    "speck": lambda d: d.rectangle((160, 160, 192, 192), fill=255),
    "whole image": lambda d: d.rectangle((0, 0, 512, 512), fill=255),
}


@pytest.mark.parametrize("shape", NAMELESS)
def test_what_is_no_sprite_has_no_name(shape: str) -> None:
    assert seen("shapes", paint(draw_mask(NAMELESS[shape]))) == []


def test_blobs_are_rarely_taken_for_shapes() -> None:
    rng, named = np.random.default_rng(0), 0
    for _ in range(40):
        field = ndimage.gaussian_filter(rng.normal(size=(64, 64)), 3)
        named += len(
            seen(
                "shapes",
                paint(
                    ndimage.gaussian_filter((field > np.quantile(field, 0.9)).astype(float), 0.6)
                ),
            )
        )
    assert named <= 8  # of some 200 blobs


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64, 3)),
        np.full((64, 64, 3), 255.0),
        np.random.default_rng(0).random((64, 64, 3)) * 255,
    ],
)
def test_images_of_nothing(pixels: np.ndarray) -> None:
    assert seen("shapes", Image.fromarray(to_bytes(pixels))) == []


def test_things_of_two_colours_that_touch_are_told_apart() -> None:
    left, right = (load_sprites("shapes").draw(name, 20)[0] for name in ("square", "circle"))
    pixels = np.full((64, 64, 3), 0.56, dtype=np.float32)
    for mask, color, x in ((left, "red", 12), (right, "blue", 31)):
        region = pixels[20:40, x : x + 20]
        region += mask[..., None] * (COLOR_VALUES[COLOR_NAMES.index(color)] - region)
    found = sorted(
        (name, color) for name, color, _ in seen("shapes", Image.fromarray(to_bytes(pixels * 255)))
    )
    assert found == [("circle", "blue"), ("square", "red")]


def test_a_thing_of_two_colours_is_none() -> None:
    mask = load_sprites("shapes").draw("circle", 24)[0]
    pixels = np.full((64, 64, 3), 0.56, dtype=np.float32)
    paint_two = np.zeros((24, 24, 3), dtype=np.float32)
    paint_two[:12], paint_two[12:] = COLORS["red"], COLORS["blue"]
    pixels[20:44, 20:44] += mask[..., None] * (paint_two - 0.56)
    assert seen("shapes", Image.fromarray(to_bytes(pixels * 255))) == []
