"""A rule-based detector for the embedded scenes: no weights, nothing learned.

Analysis by synthesis. The background is fitted where no object covers it. Every pixel is explained
as a blend of the background and one of the ten colours; connected pixels where a colour prevails
form a thing. The thing's coverage map is compared with every sprite at several sizes, positions and
blurs; the best one gives name and box. The score is a soft intersection over union, so a blob that
resembles no sprite scores low and is not counted.

Shapes: S = SIDE pixels, P pixels of a selection, M sprites (names), K = 10 colours.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from vqrae.data.scenes.scene import COLOR_NAMES, COLOR_VALUES, MARGIN
from vqrae.data.scenes.sprites import SpriteSet
from vqrae.eval.geneval.rules import Box, Detection

SIDE = 64  # pixels of a side that the rules are tuned for; other images are scaled to it
SIZES = (14, 44)  # sprite sizes that are looked for, inclusive; wider than what scenes hold
MIN_AREA = 36  # pixels; smaller things are specks
# Pixels around a thing within which its faint parts (a handle, a blurred tip) belong to it.
REACH = 5
FAINT = 0.12  # coverage below this is background
SMOOTHING = 1.0  # pixels of blur that thing and sprites get alike, against noise and blotches
BLURS = (0.0, 0.7, 1.3)  # further blurs of the sprites, in pixels: a soft image is not a wrong one
SHIFTS = tuple(itertools.product((-1, 0, 1), repeat=2))  # (dy, dx)
OPACITY = 0.3  # of "the blend should be opaque" vs "the blend should match" when choosing a colour
DISTINCTION = 0.03  # overlap by which the best name must lead; a smaller lead costs score
PURITY = 0.6  # share of a thing's pixels that must have its colour; fewer cost score

Thing = tuple[np.ndarray, np.ndarray]
"""Connected opaque pixels, and the territory in which its faint parts may be; both (S, S) bool."""


class SceneDetector:
    """Finds the sprites of one set in an image; see the module.

    A thing counts as seen above `threshold`. True scenes of shapes score 0.98 and more, after a
    blur of one pixel above 0.9, at a reconstruction's 28 dB above 0.8; an oblong or a half disc
    stays below 0.74.
    """

    threshold = counting_threshold = 0.74

    def __init__(self, sprites: SpriteSet) -> None:
        self.name = f"scene-detector({sprites.name})"
        self._matcher = SpriteMatcher(sprites)

    def detect(self, image: Image.Image) -> list[Detection]:
        """Every thing in the image under its best name, whatever its score; masks (S, S) bool."""
        view = View.of(image)
        components, _ = ndimage.label(view.opaque)
        found: list[Detection] = []
        for thing in _divide(components):
            whole = self._recognize(view, thing)
            parts: list[Detection] = []
            if whole.score <= self.threshold:  # two objects that touch?
                parts = [self._recognize(view, part) for part in _split(view, thing)]
            found += parts if any(part.score > self.threshold for part in parts) else [whole]
        width, height = image.size[0] / SIDE, image.size[1] / SIDE
        scaled = []
        for item in found:
            x0, y0, x1, y1 = item.box
            box = (x0 * width, y0 * height, x1 * width, y1 * height)
            scaled.append(Detection(item.name, item.score, box, item.mask))
        return scaled

    def _recognize(self, view: "View", thing: Thing) -> Detection:
        mask, territory = thing
        color = _color(view, mask)
        difference = COLOR_VALUES[color] - view.background
        square = np.square(difference).sum(axis=-1)
        coverage = ((view.pixels - view.background) * difference).sum(axis=-1) / square
        visible = territory & (np.abs(coverage) > FAINT)
        coverage = np.where(visible, coverage.clip(-0.5, 1.5), 0)
        # A lighter or darker tone of the colour moves the coverage by this much.
        shift = (COLOR_VALUES[color] * difference).sum(axis=-1)
        tint = float(shift[mask].mean() / square[mask].mean())
        name, overlap, box = self._matcher.match(coverage, tint)
        purity = float((view.labels[_interior(mask)] == color).mean())
        return Detection(name, overlap * min(1.0, purity / PURITY), box, mask)


class SceneColorClassifier:
    """GenEval's colour test for scenes: the palette colour nearest to a thing's interior."""

    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        """One colour name per detection of `SceneDetector`."""
        view = View.of(image)
        masks = [detection.mask for detection in detections if detection.mask is not None]
        return [COLOR_NAMES[_color(view, mask)] for mask in masks]


# ---- pixels


@dataclass(frozen=True)
class View:
    """An image and its explanation: background, and each pixel's colour index and opacity.

    pixels and background are (S, S, 3) in [0, 1]; labels and opaque (S, S).
    """

    pixels: np.ndarray
    background: np.ndarray
    labels: np.ndarray
    opaque: np.ndarray

    @classmethod
    def of(cls, image: Image.Image) -> "View":
        image = image.convert("RGB")
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
        pixels = np.asarray(image, dtype=np.float32) / 255
        background = fit_background(pixels, _border())
        labels, opaque = _label(pixels, background)
        # Again, with everything that the first fit took for background.
        visible = ~ndimage.binary_dilation(opaque, iterations=4)
        if visible.mean() > 0.2:
            background = fit_background(pixels, visible)
            labels, opaque = _label(pixels, background)
        return cls(pixels, background, labels, opaque)


def fit_background(pixels: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Continue a background (S, S, 3) below things: a plane, plus the periodic texture that fits
    best.

    `visible` (S, S) is where the background shows; a minority of outliers is tolerated.
    """
    values = pixels[visible]
    inliers = np.abs(values - np.median(values, axis=0)).max(axis=1) < 0.2
    if not inliers.any():
        inliers[:] = True
    values, designs = values[inliers], _background_designs()
    design = designs[:, visible][:, inliers]  # (textures, P, 4)
    transposed = design.transpose(0, 2, 1)
    moment = transposed @ values
    # Ridge regression; of all textures, the one that explains the most variance.
    weights = np.linalg.solve(transposed @ design + np.eye(4, dtype=np.float32), moment)
    best = (weights * moment).sum(axis=(1, 2)).argmax()
    return designs[best] @ weights[best]


def _border() -> np.ndarray:
    """The pixels that objects keep away from, (S, S) bool."""
    return np.pad(np.zeros((SIDE - 2 * MARGIN,) * 2, dtype=bool), MARGIN, constant_values=True)


@functools.lru_cache(maxsize=1)
def _background_designs() -> np.ndarray:
    """Regressors [1, x, y, wave] for the periodic textures of scenes, (textures, S, S, 4)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    waves = []
    for period in (8, 16):
        for along in (np.cos(a) * x + np.sin(a) * y for a in np.arange(4) * np.pi / 4):
            waves += [np.sin(2 * np.pi * along / period)]
        waves.append((x // period + y // period) % 2 - 0.5)
        radius = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2
        waves.append((radius < (0.3 * period) ** 2) - 0.3)
    designs = []
    for wave in waves:
        # Large dots do not show on the border: centred there, they get no weight from it instead of
        # competing with the plane.
        wave = wave - wave[_border()].mean()
        plane = [np.ones_like(x), x / SIDE - 0.5, y / SIDE - 0.5]
        designs.append(np.stack([*plane, wave], axis=-1))
    return np.stack(designs).astype(np.float32)


def _label(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel as a blend: colour index, and whether the colour has more than half of it."""
    departure = pixels - background
    labels = np.zeros(pixels.shape[:2], dtype=np.int64)
    opaque = np.zeros(pixels.shape[:2], dtype=bool)
    where = np.square(departure).sum(axis=-1) > 0.15**2
    cost, share = _blend(departure[where], background[where])
    best = cost.argmin(axis=1)
    labels[where], opaque[where] = best, share[np.arange(len(best)), best] > 0.5
    return labels, opaque


def _blend(departure: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost and share (P, K) of each colour in the blend that explains a departure (P, 3) best.

    With OPACITY = 1 the cost would be the squared distance to the pure colour; less forgives
    blurred edges.
    """
    difference = COLOR_VALUES - background[:, None]  # (P, K, 3)
    square = np.square(difference).sum(axis=-1)
    product = np.einsum("pc,pkc->pk", departure, difference)
    share = (product / square).clip(0, 1)
    distance = np.square(departure).sum(axis=-1)[:, None]
    mismatch = distance - 2 * share * product + np.square(share) * square
    return mismatch + OPACITY * np.square(1 - share) * square, share


# ---- things


def _split(view: View, thing: Thing) -> list[Thing]:
    """The thing's regions of one colour each; none when one colour fills it."""
    mask = thing[0]
    regions = np.zeros(mask.shape, dtype=np.int64)
    for color in np.unique(view.labels[mask]):
        core = ndimage.binary_opening(mask & (view.labels == color))
        pieces, _ = ndimage.label(core)
        regions = np.where(core, pieces + regions.max(), regions)
    parts = _divide(regions)
    return parts if len(parts) > 1 else []


def _divide(components: np.ndarray) -> list[Thing]:
    """Things from an image of component numbers; a faint pixel belongs to the nearest of them."""
    areas = np.bincount(components.ravel())
    areas[0] = 0
    kept = np.flatnonzero(areas >= MIN_AREA)
    if not len(kept):
        return []
    components = np.where(np.isin(components, kept), components, 0)
    distance, nearest = ndimage.distance_transform_edt(components == 0, return_indices=True)
    owner = np.where(distance <= REACH, components[tuple(nearest)], 0)
    return [(components == number, owner == number) for number in kept]


def _interior(mask: np.ndarray) -> np.ndarray:
    """The mask without its anti-aliased rim, where something is left."""
    eroded = ndimage.binary_erosion(mask)
    return eroded if eroded.sum() >= 8 else mask


def _color(view: View, mask: np.ndarray) -> int:
    """Index of the colour that best explains the mean of a thing's interior."""
    inside = _interior(mask)
    mean, base = view.pixels[inside].mean(axis=0), view.background[inside].mean(axis=0)
    cost, _ = _blend((mean - base)[None], base[None])
    return int(cost[0].argmin())


# ---- shapes


@dataclass(frozen=True)
class TemplateBank:
    """All sprites at one size, centred by their mass.

    Attributes:
        coverage: (M, blurs, S * S).
        shading: the same of coverage * (shade - 1); zero for sprites of one tone.
        boxes: (M, 4).
        areas: (M,).
    """

    coverage: np.ndarray
    shading: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray


class SpriteMatcher:
    """Compares coverage maps with every sprite of a set at several sizes, shifts and blurs."""

    def __init__(self, sprites: SpriteSet) -> None:
        self.sprites = sprites
        self._bank = functools.lru_cache(maxsize=None)(self._make_bank)

    def match(self, coverage: np.ndarray, tint: float) -> tuple[str, float, Box]:
        """Best name, its score in [0, 1], and the box of that sprite.

        The score is the soft intersection over union, less where another name fits nearly as well.
        coverage (S, S) is how much of each pixel a thing covers, tint the change of coverage per
        unit of the sprite's shade.
        """
        area = max(float(coverage.sum()), 1.0)
        mass = [float((coverage * axis).sum() / area) for axis in np.mgrid[0:SIDE, 0:SIDE]]
        y, x = (int(min(max(center, 0), SIDE) + 0.5) for center in mass)
        window = np.pad(_smooth(coverage, SMOOTHING), SIDE)
        top, left = y + SIDE // 2, x + SIDE // 2
        shifted = [window[top + dy :, left + dx :][:SIDE, :SIDE].ravel() for dy, dx in SHIFTS]
        views = np.stack(shifted)
        overlaps = np.zeros(len(self.sprites.names))
        boxes = np.zeros((len(overlaps), 4))
        for size, names in self._candidates(area).items():
            bank = self._bank(size)
            templates = bank.coverage[names]
            if bank.shading.any():
                templates = templates + tint * bank.shading[names]
            for name, blurred in zip(names, templates, strict=True):
                # Squared distance of each blur and shift, less a constant.
                error = np.square(blurred).sum(axis=1)[:, None] - 2 * blurred @ views.T
                blur, shift = np.unravel_index(error.argmin(), error.shape)
                overlap = _soft_iou(blurred[blur], views[shift])
                if overlap > overlaps[name]:
                    dy, dx = SHIFTS[shift]
                    overlaps[name] = overlap
                    boxes[name] = bank.boxes[name] + np.array([x + dx, y + dy] * 2) - SIDE // 2
        second, first = np.argsort(overlaps)[-2:]
        x0, y0, x1, y1 = (float(edge) for edge in boxes[first])
        certainty = min(1.0, (overlaps[first] - overlaps[second]) / DISTINCTION)
        return self.sprites.names[first], float(overlaps[first] * certainty), (x0, y0, x1, y1)

    def _candidates(self, area: float) -> dict[int, list[int]]:
        """Size -> sprites of about this area at that size. Unlike a box, an area survives blur."""
        sizes: dict[int, list[int]] = {}
        for name, reference in enumerate(self._bank(24).areas):
            guess = round(24 * float(np.sqrt(area / reference)))
            for size in {int(np.clip(guess + step, *SIZES)) for step in range(-2, 3)}:
                sizes.setdefault(size, []).append(name)
        return sizes

    def _make_bank(self, size: int) -> TemplateBank:
        names = self.sprites.names
        layers = np.zeros((2, len(names), len(BLURS), SIDE, SIDE), dtype=np.float32)
        boxes, areas = np.zeros((len(names), 4), dtype=np.int64), np.zeros(len(names))
        axes = np.mgrid[0:size, 0:size]
        for i, name in enumerate(names):
            mask, shade = self.sprites.draw(name, size)
            y, x = (round(float((mask * axis).sum() / mask.sum())) for axis in axes)
            top, left = SIDE // 2 - y, SIDE // 2 - x
            place = slice(top, top + size), slice(left, left + size)
            for j, blur in enumerate(BLURS):
                for canvas, layer in zip(layers[:, i, j], (mask, mask * (shade - 1)), strict=True):
                    canvas[place] = layer
                    canvas[:] = _smooth(canvas, float(np.hypot(blur, SMOOTHING)))
            inside = mask > 0.5
            rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            boxes[i] += (left, top) * 2
            areas[i] = mask.sum()
        coverage, shading = layers.reshape(2, len(names), len(BLURS), -1)
        return TemplateBank(coverage, shading, boxes, areas)


def _smooth(array: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(array, sigma, mode="constant")


def _soft_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two coverage maps; for values of one sign sum(min) / sum(max)."""
    return float(1 - np.abs(a - b).sum() / np.maximum(np.abs(a), np.abs(b)).sum())
