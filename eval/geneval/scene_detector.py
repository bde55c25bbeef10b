"""A rule-based detector for the embedded scenes, behind the protocols of `eval/geneval.py`: no weights, nothing learned.

Analysis by synthesis. The background is fitted where no object covers it. Every pixel is explained as a blend of the
background and one of the ten colours; where a colour prevails, connected pixels form a thing. The thing's coverage map is
compared with every sprite at several sizes, positions and blurs, all treated alike; the best one gives name and box. The
score is a soft intersection over union, so a blob that looks like no sprite scores low and is not counted.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from vqrae.data.scenes.scene import COLOR_NAMES, COLOR_VALUES, MARGIN
from vqrae.data.scenes.sprites import SpriteSet
from vqrae.eval.geneval import Box, Detection

SIDE = 64  # pixels of a side that the rules are tuned for; other images are scaled to it
SIZES = (14, 44)  # sprite sizes that are looked for, inclusive; wider than what scenes hold
MIN_AREA = 36  # pixels; smaller things are specks
REACH = 5  # pixels around a thing in which its faint parts (a thin handle, a blurred tip) still belong to it
FAINT = 0.12  # coverage below this is background
SMOOTHING = 1.0  # pixels of blur that thing and sprites get alike, against noise and blotches
BLURS = (0.0, 0.7, 1.3)  # further blurs of the sprites, in pixels: a soft image is not a wrong one
SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
OPACITY = 0.3  # weight of "the blend should be opaque" against "the blend should match" when a colour is chosen
DISTINCTION = 0.03  # overlap by which the best name must lead the second; a smaller lead costs score in proportion
PURITY = 0.6  # a thing with a smaller share of pixels of its own colour loses score in proportion


class SceneDetector:
    """Finds the sprites of one set in an image; see the module.

    Attributes:
        threshold: score above which a thing counts as seen. True scenes of shapes score 0.98 and more, after a blur of one
            pixel above 0.9, at a reconstruction's 28 dB above 0.8; an oblong or a half disc stays below 0.74.
        counting_threshold: the same for GenEval's counting task.
    """

    def __init__(
        self, sprites: SpriteSet, *, threshold: float = 0.74, counting_threshold: float = 0.74
    ) -> None:
        self.name = f"scene-detector({sprites.name})"
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self._matcher = SpriteMatcher(sprites)

    def detect(self, image: Image.Image) -> list[Detection]:
        """Every thing in the image under its best name, whatever the score. Masks are (64, 64) bool."""
        view = _View.of(image)
        found = []
        for thing in _things(view.opaque):
            whole = self._recognize(view, thing)
            parts = (
                []
                if whole.score > self.threshold
                else [self._recognize(view, part) for part in _split(view, thing)]
            )
            found += parts if any(part.score > self.threshold for part in parts) else [whole]
        width, height = image.size[0] / SIDE, image.size[1] / SIDE
        return [
            Detection(
                d.name,
                d.score,
                (d.box[0] * width, d.box[1] * height, d.box[2] * width, d.box[3] * height),
                d.mask,
            )
            for d in found
        ]

    def _recognize(self, view: "_View", thing: "_Thing") -> Detection:
        color = _color(view, thing.mask)
        difference = COLOR_VALUES[color] - view.background
        square = np.square(difference).sum(axis=-1)
        coverage = ((view.pixels - view.background) * difference).sum(axis=-1) / square
        coverage = np.where(
            thing.territory & (np.abs(coverage) > FAINT), coverage.clip(-0.5, 1.5), 0
        )
        # A lighter or darker tone of the colour moves the coverage by this much.
        tint = float(
            (COLOR_VALUES[color] * difference).sum(axis=-1)[thing.mask].mean()
            / square[thing.mask].mean()
        )
        name, overlap, box = self._matcher.match(coverage, tint)
        purity = float((view.labels[_interior(thing.mask)] == color).mean())
        return Detection(name, overlap * min(1.0, purity / PURITY), box, thing.mask)


class SceneColorClassifier:
    """GenEval's colour test for scenes: the palette colour nearest to a thing's interior."""

    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        """One colour name per detection of `SceneDetector`."""
        view = _View.of(image)
        return [
            COLOR_NAMES[_color(view, detection.mask)]
            for detection in detections
            if detection.mask is not None
        ]


# ---- pixels


@dataclass(frozen=True)
class _View:
    """An image, explained: pixels and background (64, 64, 3) in [0, 1]; colour index and opacity of each pixel (64, 64)."""

    pixels: np.ndarray
    background: np.ndarray
    labels: np.ndarray
    opaque: np.ndarray

    @classmethod
    def of(cls, image: Image.Image) -> "_View":
        image = image.convert("RGB")
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
        pixels = np.asarray(image, dtype=np.float32) / 255
        background = fit_background(pixels, _border())
        labels, opaque = _label(pixels, background)
        visible = ~ndimage.binary_dilation(opaque, iterations=4)
        if visible.mean() > 0.2:
            background = fit_background(pixels, visible)
            labels, opaque = _label(pixels, background)
        return cls(pixels, background, labels, opaque)


def fit_background(pixels: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Continue a background below the things on it: a plane, plus the one periodic texture that fits it best.

    Args:
        pixels: (64, 64, 3) in [0, 1].
        visible: (64, 64), where it is the background that one sees; a minority of outliers is forgiven.

    Returns:
        The background, (64, 64, 3).
    """
    values = pixels[visible]
    inliers = np.abs(values - np.median(values, axis=0)).max(axis=1) < 0.2
    if not inliers.any():
        inliers[:] = True
    values, designs = values[inliers], _background_designs()
    design = designs[:, visible][:, inliers]  # (textures, P, 4)
    moment = design.transpose(0, 2, 1) @ values
    weights = np.linalg.solve(
        design.transpose(0, 2, 1) @ design + np.eye(4, dtype=np.float32), moment
    )
    best = (weights * moment).sum(axis=(1, 2)).argmax()
    return designs[best] @ weights[best]


def _border() -> np.ndarray:
    """The pixels that objects keep away from, (64, 64) bool."""
    return np.pad(np.zeros((SIDE - 2 * MARGIN,) * 2, dtype=bool), MARGIN, constant_values=True)


@functools.lru_cache(maxsize=1)
def _background_designs() -> np.ndarray:
    """Regressors [1, x, y, wave] for the periodic textures of scenes, (textures, 64, 64, 4)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    waves = []
    for period in (8, 16):
        waves += [
            np.sin(2 * np.pi * (np.cos(a) * x + np.sin(a) * y) / period)
            for a in np.arange(4) * np.pi / 4
        ]
        waves.append((x // period + y // period) % 2 - 0.5)
        waves.append(
            ((x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.3 * period) ** 2)
            - 0.3
        )
    # Large dots do not show on the border: centred there, they get no weight from it instead of trading with the plane.
    waves = [wave - wave[_border()].mean() for wave in waves]
    designs = [
        np.stack([np.ones_like(x), x / SIDE - 0.5, y / SIDE - 0.5, wave], axis=-1) for wave in waves
    ]
    return np.stack(designs).astype(np.float32)


def _label(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain every pixel as a blend: colour index, and whether the colour has more than half of the blend."""
    departure = pixels - background
    labels = np.zeros(pixels.shape[:2], dtype=np.int64)
    opaque = np.zeros(pixels.shape[:2], dtype=bool)
    where = np.square(departure).sum(axis=-1) > 0.15**2
    cost, share = _blend(departure[where], background[where])
    best = cost.argmin(axis=1)
    labels[where], opaque[where] = best, share[np.arange(len(best)), best] > 0.5
    return labels, opaque


def _blend(departure: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost and share (P, 10) of every colour in the blend that best explains a departure (P, 3) from the background.

    With OPACITY = 1 the cost would be the squared distance to the pure colour; less forgives blurred edges.
    """
    difference = COLOR_VALUES - background[:, None]  # (P, 10, 3)
    square = np.square(difference).sum(axis=-1)
    product = np.einsum("pc,pkc->pk", departure, difference)
    share = (product / square).clip(0, 1)
    mismatch = (
        np.square(departure).sum(axis=-1)[:, None] - 2 * share * product + np.square(share) * square
    )
    return mismatch + OPACITY * np.square(1 - share) * square, share


# ---- things


@dataclass(frozen=True)
class _Thing:
    """Connected opaque pixels, and the surroundings in which its faint parts may lie; both (64, 64) bool."""

    mask: np.ndarray
    territory: np.ndarray


def _things(opaque: np.ndarray) -> Iterator[_Thing]:
    components, _ = ndimage.label(opaque)
    return _divide(components)


def _split(view: _View, thing: _Thing) -> Iterator[_Thing]:
    """The thing's regions of one colour each: two objects that touch. Nothing when one colour fills it."""
    regions = np.zeros(thing.mask.shape, dtype=np.int64)
    for color in np.unique(view.labels[thing.mask]):
        core = ndimage.binary_opening(thing.mask & (view.labels == color))
        pieces, _ = ndimage.label(core)
        regions = np.where(core, pieces + regions.max(), regions)
    parts = list(_divide(regions))
    return iter(parts if len(parts) > 1 else [])


def _divide(components: np.ndarray) -> Iterator[_Thing]:
    """Things from an image of component numbers; a faint pixel belongs to the nearest of them."""
    areas = np.bincount(components.ravel())
    areas[0] = 0
    kept = np.flatnonzero(areas >= MIN_AREA)
    components = np.where(np.isin(components, kept), components, 0)
    if len(kept):
        distance, nearest = ndimage.distance_transform_edt(components == 0, return_indices=True)
        owner = np.where(distance <= REACH, components[tuple(nearest)], 0)
        for number in kept:
            yield _Thing(components == number, owner == number)


def _interior(mask: np.ndarray) -> np.ndarray:
    """The mask without its anti-aliased rim, where something is left."""
    eroded = ndimage.binary_erosion(mask)
    return eroded if eroded.sum() >= 8 else mask


def _color(view: _View, mask: np.ndarray) -> int:
    """Index of the colour that best explains the mean of a thing's interior."""
    inside = _interior(mask)
    mean, base = view.pixels[inside].mean(axis=0), view.background[inside].mean(axis=0)
    cost, _ = _blend((mean - base)[None], base[None])
    return int(cost[0].argmin())


# ---- shapes


@dataclass(frozen=True)
class _Bank:
    """All sprites at one size, centred by their mass: templates (names, blurs, 64 * 64), boxes (names, 4), areas (names,)."""

    coverage: np.ndarray
    shading: np.ndarray  # coverage * (shade - 1); zero for sprites of one tone
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

        Args:
            coverage: (64, 64), how much of each pixel a thing covers.
            tint: change of coverage per unit of the sprite's shade.
        """
        area = max(float(coverage.sum()), 1.0)
        y, x = (
            int(np.clip((coverage * axis).sum() / area, 0, SIDE) + 0.5)
            for axis in np.mgrid[0:SIDE, 0:SIDE]
        )
        window = np.pad(_smooth(coverage, SMOOTHING), SIDE)
        top, left = y + SIDE // 2, x + SIDE // 2
        views = np.stack(
            [window[top + dy :, left + dx :][:SIDE, :SIDE].ravel() for dy, dx in SHIFTS]
        )
        overlaps = np.zeros(len(self.sprites.names))
        boxes = np.zeros((len(overlaps), 4))
        for size, names in self._candidates(area).items():
            bank = self._bank(size)
            templates = bank.coverage[names] + (
                tint * bank.shading[names] if bank.shading.any() else 0
            )
            for name, blurred in zip(names, templates, strict=True):
                error = (
                    np.square(blurred).sum(axis=1)[:, None] - 2 * blurred @ views.T
                )  # + the same constant for all
                blur, shift = np.unravel_index(error.argmin(), error.shape)
                overlap = _soft_iou(blurred[blur], views[shift])
                if overlap > overlaps[name]:
                    dy, dx = SHIFTS[shift]
                    overlaps[name], boxes[name] = (
                        overlap,
                        bank.boxes[name] + np.array([x + dx, y + dy] * 2) - SIDE // 2,
                    )
        second, first = np.argsort(overlaps)[-2:]
        x0, y0, x1, y1 = (float(edge) for edge in boxes[first])
        certainty = min(1.0, (overlaps[first] - overlaps[second]) / DISTINCTION)
        return self.sprites.names[first], float(overlaps[first] * certainty), (x0, y0, x1, y1)

    def _candidates(self, area: float) -> dict[int, list[int]]:
        """Size -> sprites that have about this area at that size. Unlike a box, an area survives blur."""
        sizes: dict[int, list[int]] = {}
        for name, reference in enumerate(self._bank(24).areas):
            guess = round(24 * float(np.sqrt(area / reference)))
            for size in {int(np.clip(guess + step, *SIZES)) for step in range(-2, 3)}:
                sizes.setdefault(size, []).append(name)
        return sizes

    def _make_bank(self, size: int) -> _Bank:
        drawn = [self.sprites.draw(name, size) for name in self.sprites.names]
        canvases = np.zeros((2, len(drawn), len(BLURS), SIDE, SIDE), dtype=np.float32)
        boxes, areas = [], []
        for i, (mask, shade) in enumerate(drawn):
            y, x = (
                round(float((mask * axis).sum() / mask.sum())) for axis in np.mgrid[0:size, 0:size]
            )
            top, left = SIDE // 2 - y, SIDE // 2 - x
            for j, blur in enumerate(BLURS):
                for canvas, layer in zip(
                    canvases[:, i, j], (mask, mask * (shade - 1)), strict=True
                ):
                    canvas[top : top + size, left : left + size] = layer
                    canvas[:] = _smooth(canvas, float(np.hypot(blur, SMOOTHING)))
            rows, columns = (
                np.flatnonzero((mask > 0.5).any(axis=1)),
                np.flatnonzero((mask > 0.5).any(axis=0)),
            )
            boxes.append(
                (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            )
            areas.append(float(mask.sum()))
        coverage, shading = canvases.reshape(2, len(drawn), len(BLURS), -1)
        return _Bank(coverage, shading, np.array(boxes), np.array(areas))


def _smooth(array: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(array, sigma, mode="constant")


def _soft_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two coverage maps; for values of one sign sum(min) / sum(max)."""
    return float(1 - np.abs(a - b).sum() / np.maximum(np.abs(a), np.abs(b)).sum())
