"""Scenes: one to four coloured objects on a plain, graded or textured background, from a seed.

Some combinations never occur in training: one colour of every name, and one in eight
name-relation-name triples. Validation scenes hold them on purpose, so that composition is measured
and not memory.
"""

import functools
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vqrae.data.scenes.sprites import SpriteSet

# GenEval's ten colours, in its order, as sRGB in [0, 1].
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.06),
    "yellow": (0.98, 0.90, 0.12),
    "green": (0.12, 0.60, 0.20),
    "blue": (0.12, 0.28, 0.86),
    "purple": (0.52, 0.16, 0.70),
    "pink": (1.00, 0.50, 0.75),
    "brown": (0.46, 0.27, 0.11),
    "black": (0.05, 0.05, 0.05),
    "white": (0.98, 0.98, 0.98),
}
COLOR_NAMES = tuple(COLORS)
COLOR_VALUES = np.array(list(COLORS.values()), dtype=np.float32)  # (10, 3)

# Muted, so that every object colour keeps a distance from every background.
BACKGROUNDS = np.array(
    [
        (0.56, 0.56, 0.56),
        (0.78, 0.73, 0.58),
        (0.66, 0.76, 0.84),
        (0.66, 0.80, 0.69),
        (0.43, 0.48, 0.53),
    ],
    dtype=np.float32,
)
TEXTURES = ("plain", "graded", "stripes", "checks", "dots")
# Objects are placed in boxes of three or four cells of a lattice. A coarse lattice keeps the number
# of different patches small enough for a tokenizer that trains for minutes; each object still has
# 36 places.
CELLS = 8  # per side
MARGIN = 2  # pixels between an object and its box, at 64 px
BOXES = ((3, 4), (3, 4), (3,), (3,))  # cells per side, by the number of objects
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class SceneObject:
    """One object; `name` and `color` are indices, the box has `size` pixels from (left, top)."""

    name: int
    color: int
    size: int
    left: int
    top: int

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass(frozen=True)
class Background:
    """Base colour index, texture and its strength in [-1, 1], angle (radians), period (pixels)."""

    color: int
    texture: str
    strength: float
    angle: float
    period: int


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: Background


def dominant_relation(a: SceneObject, b: SceneObject) -> str:
    """Where `a` is seen from `b`, along the axis of the larger offset."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def is_held_out_pair(name: int, color: int) -> bool:
    """One of the ten colours of every name is never seen in training."""
    return (3 * name + color) % 10 == 0  # 3 and 10 have no common factor: colours spread


def is_held_out_triple(a: int, relation: str, b: int) -> bool:
    """One in eight triples is never seen in training; "a left of b" is "b right of a"."""
    if a == b:
        return False
    if relation in ("right of", "below"):
        a, b = b, a
        relation = {"right of": "left of", "below": "above"}[relation]
    return (5 * a + 3 * b + 4 * (relation == "above")) % 8 == 0


def is_held_out(scene: Scene) -> bool:
    """True when the scene holds a combination that training never shows."""
    objects = scene.objects
    if any(is_held_out_pair(o.name, o.color) for o in objects):
        return True
    pairs = combinations(objects, 2)
    return any(is_held_out_triple(b.name, dominant_relation(b, a), a.name) for a, b in pairs)


class SceneSampler:
    """Random scenes: single objects, pairs of different things, groups of one thing, mixtures.

    Sizes and positions scale with `image_size`, the pixels of a side. `weights` are the shares of
    the kinds.
    """

    KINDS = ("single", "pair", "group", "mixture")
    KIND_WEIGHTS = (0.25, 0.35, 0.2, 0.2)
    LESSON_WEIGHTS = (0.1, 0.5, 0.1, 0.3)  # only pairs and mixtures hold things to compare

    def __init__(
        self,
        sprites: SpriteSet,
        image_size: int = 64,
        weights: tuple[float, ...] = KIND_WEIGHTS,
    ) -> None:
        if image_size % CELLS:
            raise ValueError(
                f"got image_size {image_size}, expected a multiple of {CELLS}: "
                "scenes are laid out in cells"
            )
        self.sprites = sprites
        self.image_size = image_size
        self.weights = weights

    def sample(self, rng: np.random.Generator, *, held_out: bool | None = False) -> Scene:
        """One scene; `held_out`: whether it holds combinations not in training, None: either."""
        while True:
            scene = self._any_scene(rng)
            if held_out is None or is_held_out(scene) == held_out:
                return scene

    def _any_scene(self, rng: np.random.Generator) -> Scene:
        kind = self.KINDS[np.searchsorted(np.cumsum(self.weights), rng.random())]
        low, high = {"single": (1, 1), "pair": (2, 2), "group": (2, 4), "mixture": (3, 4)}[kind]
        count = low if low == high else int(rng.integers(low, high + 1))
        num_names = len(self.sprites.names)
        if kind == "group":
            names = np.full(count, rng.integers(num_names))
        elif kind == "pair":
            names = rng.choice(num_names, 2, replace=False)
        else:
            names = rng.integers(num_names, size=count)
        if kind == "group" and rng.random() < 0.5:
            colors = np.full(count, rng.integers(len(COLORS)))
        else:
            colors = rng.integers(len(COLORS), size=count)
        things = zip(names, colors, self._place(rng, count), strict=True)
        objects = tuple(SceneObject(int(n), int(c), *box) for n, c, box in things)
        return Scene(objects, self._background(rng))

    def _place(self, rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
        """(size, left, top) of objects in boxes of lattice cells that do not overlap."""
        cell, margin = self.image_size // CELLS, round(MARGIN * self.image_size / 64)
        sides = BOXES[count - 1]
        boxes: list[tuple[int, int, int]] = []  # in cells
        tries = 0
        while len(boxes) < count:
            if tries == 40:  # the first boxes leave no room for the others
                boxes, tries = [], 0
            tries += 1
            # As rng.choice draws, in a fifth of its time.
            side = sides[rng.integers(len(sides))]
            left, top = rng.integers(CELLS - side + 1, size=2).tolist()
            apart = (
                left + side <= x or x + s <= left or top + side <= y or y + s <= top
                for s, x, y in boxes
            )
            if all(apart):
                boxes.append((side, left, top))
        return [(s * cell - 2 * margin, x * cell + margin, y * cell + margin) for s, x, y in boxes]

    def _background(self, rng: np.random.Generator) -> Background:
        return Background(
            color=int(rng.integers(len(BACKGROUNDS))),
            texture=TEXTURES[rng.integers(len(TEXTURES))],
            strength=float(rng.uniform(0.4, 1) * (-1, 1)[rng.integers(2)]),
            angle=float(rng.integers(4) * np.pi / 2),
            period=(8, 16)[rng.integers(2)],
        )


def _render_background(background: Background, size: int) -> np.ndarray:
    wave = _wave(background.texture, background.angle, background.period, size)
    return BACKGROUNDS[background.color] + (0.12 * background.strength * wave)[..., None]


@functools.cache
def _wave(texture: str, angle: float, period: int, size: int) -> np.ndarray:
    """Brightness of a texture (size, size), around 0. There are few, so all are kept."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    along = np.cos(angle) * x + np.sin(angle) * y
    if texture == "graded":
        return along / size - (np.cos(angle) + np.sin(angle)) / 2
    if texture == "stripes":
        return np.sin(2 * np.pi * along / period) / 2
    if texture == "checks":
        return ((x // period + y // period) % 2) - 0.5
    if texture == "dots":
        squared_distance = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2
        return (squared_distance < (0.3 * period) ** 2) - 0.3
    return np.zeros_like(x)


def render(scene: Scene, sprites: SpriteSet, image_size: int = 64) -> np.ndarray:
    """The scene as pixels, anti-aliased, uint8 (H, W, 3)."""
    image = _render_background(scene.background, image_size).astype(np.float32)
    for item in scene.objects:
        mask, shade = sprites.draw(sprites.names[item.name], item.size)
        region = image[item.top : item.top + item.size, item.left : item.left + item.size]
        shaded = COLOR_VALUES[item.color] * shade[..., None]
        region += mask[..., None] * (shaded - region)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
