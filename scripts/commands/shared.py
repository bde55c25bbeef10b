"""What several commands share: options, devices, images in and out. Importing it costs nothing heavy."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BATCH_SIZE = 32
GRID_COLUMNS, GRID_ROWS = 16, 32

Run = Callable[[argparse.Namespace], int | None]


def add_command(
    commands: Any, name: str, run: Run, text: str, *, model: str | None = None
) -> argparse.ArgumentParser:
    """Add a command; `model` says what its `--model` holds, and gives it `--device` as well."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    if model:
        command.add_argument(
            "--model", required=True, help=f"{model}: run directory, model folder or hub id"
        )
        command.add_argument("--device", help="cpu, cuda, … (default: cuda when there is one)")
    return command


def quiet() -> None:
    """No progress bars of weights that load in a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def chosen_device(arguments: argparse.Namespace) -> str:
    from vqrae.common.distributed import choose_device

    return choose_device(arguments.device)


class ImageReader:
    """Batches of the readable images of a file or folder; broken ones are reported, remembered and left out."""

    def __init__(self, source: str, image_size: int) -> None:
        from vqrae.data.image_files import list_images

        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist: give an image or a folder of images")
        root = path if path.is_dir() else path.parent
        self.paths = {
            p.relative_to(root).as_posix(): p
            for p in (list_images(path) if path.is_dir() else [path])
        }
        self.image_size = image_size
        self.broken: list[str] = []

    def __iter__(self) -> Iterator[tuple[list[str], "Tensor"]]:
        """Yield (names relative to the source, images (B, 3, H, W) in [0, 1])."""
        import torch

        from vqrae.common.files import printable
        from vqrae.common.images import image_to_tensor, open_image, resize_and_crop

        batch: dict[str, Tensor] = {}
        for name, path in self.paths.items():
            try:
                batch[name] = image_to_tensor(resize_and_crop(open_image(path), self.image_size))
            except ValueError as error:
                print(printable(f"vqrae: skipped {error}"), file=sys.stderr)
                self.broken.append(name)
            if len(batch) == BATCH_SIZE:
                yield list(batch), torch.stack(list(batch.values()))
                batch = {}
        if batch:
            yield list(batch), torch.stack(list(batch.values()))
        if len(self.broken) == len(self.paths):
            raise ValueError(f"none of the {len(self.paths)} images could be read")

    def summary(self) -> str:
        """How many images were read."""
        return f"{len(self.paths) - len(self.broken)} images, {len(self.broken)} broken and skipped"


def output_names(names: Sequence[str]) -> dict[str, str]:
    """A PNG name below the output folder for each input: `a/b.jpg` -> `a/b.png`, or `a/b.jpg.png` where two would meet."""
    stems = Counter(str(Path(name).with_suffix("")) for name in names)
    return {
        name: f"{name if stems[stem] > 1 else stem}.png"
        for name in names
        for stem in [str(Path(name).with_suffix(""))]
    }


def enlarged_grid(rows: list[list["Tensor"]], labels: Sequence[str]) -> "Image":
    """An image grid whose small images are enlarged."""
    from vqrae.common.images import image_grid

    return image_grid(rows, labels=labels, scale=max(1, 128 // rows[0][0].shape[-1]))
