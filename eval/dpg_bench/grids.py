"""DPG-Bench's images: one file per prompt, called after the item, its four images in a 2 x 2 grid.

FOLDER/partiprompts302.png      top left, top right, bottom left, bottom right
"""

from pathlib import Path

from PIL import Image

from vqrae.common.images import IMAGE_SUFFIXES, open_image


def find_images(folder: str | Path) -> dict[str, Path]:
    """Image files by item id: the name up to its first dot.

    Raises:
        ValueError: when the folder does not exist, holds none, or two for one item.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        name = path.name.split(".")[0]
        if name in found:
            raise ValueError(f"{found[name]} and {path} both belong to item {name}: keep one")
        found[name] = path
    if not found:
        raise ValueError(
            f"{folder} holds no images: expected ITEM.png, a 2 x 2 grid, for every item of the table"
        )
    return found


def split_grid(
    path: Path, images_per_prompt: int = 4, resolution: int | None = None
) -> list[Image.Image]:
    """The images of a prompt: cells of the grid, or the whole file where there is one per prompt.

    Args:
        resolution: pixels of an image's side; the file must then have exactly that, or twice that for a grid.

    Raises:
        ValueError: when the file cannot be read or has another size.
    """
    image = open_image(path)
    columns = 1 if images_per_prompt == 1 else 2
    side = resolution or image.width // columns
    if image.size != (columns * side, columns * side):
        raise ValueError(
            f"{path} has {image.width} x {image.height} pixels, expected {columns * side} x {columns * side}"
        )
    corners = [(0, 0), (side, 0), (0, side), (side, side)][:images_per_prompt]
    return [image.crop((left, top, left + side, top + side)) for left, top in corners]
