"""Images to codes and back: reconstruct, encode, decode, codebook."""

import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from vqrae.common.checkpoints import local_model, require_kind
from vqrae.common.cli import progress_line
from vqrae.common.distributed import choose_device
from vqrae.common.files import (
    atomic_path,
    printable,
    require_same_tokenizer,
    weights_fingerprint,
    write_json,
)
from vqrae.common.images import (
    image_grid,
    image_to_tensor,
    open_image,
    resize_and_crop,
    save_image,
    tensor_to_image,
)
from vqrae.data.image_files import list_images
from vqrae.eval.codebook.evaluate import write_codebook_report
from vqrae.tokenizer.modeling import VQRAEModel

BATCH_SIZE = 32
GRID_COLUMNS = 16


@dataclass(frozen=True, kw_only=True)
class WithTokenizer:
    """What the commands of this file share."""

    model: str
    """Tokenizer: run directory, model folder or hub id."""
    device: str | None = None
    """cpu, cuda, ...; by default CUDA if torch sees a GPU."""

    def load(self) -> tuple[VQRAEModel, str]:
        """The tokenizer and its fingerprint."""
        logging.disable_progress_bar()
        folder = local_model(self.model)
        require_kind(folder, ("vqrae",), "a tokenizer (model_type vqrae)")
        model = VQRAEModel.from_pretrained(folder).eval().to(choose_device(self.device))
        return model, weights_fingerprint(folder)


@dataclass(frozen=True, kw_only=True)
class Reconstruct(WithTokenizer):
    """Encode images to codes and decode them again: pairs, a grid of the first ones, PSNR."""

    images: str
    """An image, or a folder of images of any size and mode."""
    out: str
    """Folder for NAME.png (original | reconstruction), grid.png and metrics.json."""

    def run(self) -> None:
        progress = progress_line("reconstruct")
        model, fingerprint = self.load()
        reader = ImageReader(self.images, model.config.image_size)
        outputs = output_names(list(reader.paths))
        out = Path(self.out)
        psnr: dict[str, float] = {}
        shown: list[tuple[Tensor, Tensor]] = []
        for names, images in reader:
            with torch.inference_mode():
                decoded = model.decode(model.encode(images.to(model.device))).cpu()
            if decoded.shape != images.shape:  # a decoder may have another resolution
                size = images.shape[-2:]
                decoded = torch.nn.functional.interpolate(
                    decoded, size, mode="bilinear", antialias=True
                )
            for name, image, copy in zip(names, images, decoded, strict=True):
                save_image(image_grid([[image, copy]], scale=1), out / outputs[name])
                error = (image - copy).square().mean().clamp(min=1e-10)
                psnr[name] = round(-10 * error.log10().item(), 3)
                shown.append((image, copy))
            del shown[GRID_COLUMNS:]
            progress(len(psnr), len(reader.paths))
        rows = [list(row) for row in zip(*shown, strict=True)]
        save_image(enlarged_grid(rows, labels=["original", "reconstruction"]), out / "grid.png")
        mean = sum(psnr.values()) / len(psnr)
        report = {"tokenizer": fingerprint, "psnr": psnr, "mean_psnr": round(mean, 3)}
        write_json(out / "metrics.json", {**report, "broken": reader.broken})
        print(f"{reader.summary()}; mean PSNR {mean:.2f} dB; see {out}/grid.png and metrics.json")


@dataclass(frozen=True, kw_only=True)
class Encode(WithTokenizer):
    """Turn images into a .npz of codes, names (M,), tokenizer and codebook_size.

    Codes are (M, N), or (M, N, n) of a tokenizer with n codebooks.
    """

    images: str
    """An image, or a folder of images of any size and mode."""
    out: str
    """FILE.npz"""

    def __post_init__(self) -> None:
        if not self.out.endswith(".npz"):
            raise ValueError(f"out: got {self.out}, expected a name that ends in .npz")

    def run(self) -> None:
        progress = progress_line("encode")
        model, fingerprint = self.load()
        reader = ImageReader(self.images, model.config.image_size)
        kept: list[str] = []
        codes: list[Tensor] = []
        for names, images in reader:
            with torch.inference_mode():
                codes.append(model.encode(images.to(model.device)).cpu())
            kept += names
            progress(len(kept), len(reader.paths))
        size = model.config.codebook_size
        stored = torch.cat(codes).numpy().astype(np.uint16 if size <= 1 << 16 else np.int32)
        with atomic_path(self.out) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream,
                codes=stored,
                names=np.array(kept),
                tokenizer=np.array(fingerprint),
                codebook_size=np.array(size),
            )
        print(f"{reader.summary()}; codes {stored.shape} are in {self.out}")


@dataclass(frozen=True, kw_only=True)
class Decode(WithTokenizer):
    """Turn the codes of an .npz that `encode` made with the same tokenizer into images."""

    codes: str
    """FILE.npz written by encode."""
    out: str
    """Folder for the images."""

    def run(self) -> None:
        progress = progress_line("decode")
        names, codes, made_with = read_codes(self.codes)
        model, fingerprint = self.load()
        require_same_tokenizer(fingerprint, made_with, self.codes)
        outputs = output_names(names)
        for start in range(0, len(names), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            with torch.inference_mode():
                images = model.decode(codes[batch].to(model.device)).cpu()
            for name, image in zip(names[batch], images, strict=True):
                save_image(tensor_to_image(image), Path(self.out) / outputs[name])
            progress(min(start + BATCH_SIZE, len(names)), len(names))
        print(f"{len(names)} images are in {self.out}")


@dataclass(frozen=True, kw_only=True)
class Codebook(WithTokenizer):
    """Show what each code means and how well each codebook is used."""

    images: str
    """An image, or a folder of images of any size and mode."""
    out: str = "codebook"
    """Folder for codebook.html and codebook.json."""

    def run(self) -> None:
        model, fingerprint = self.load()
        reader = ImageReader(self.images, model.config.image_size)
        batches = (images for _, images in reader)
        source = {"source": self.images, "tokenizer": fingerprint}
        text = write_codebook_report(model, batches, self.out, **source)
        print(f"{reader.summary()}; {text}")


class ImageReader:
    """Batches of the readable images of a file or folder; broken ones are counted."""

    def __init__(self, source: str, image_size: int) -> None:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist: give an image or a folder of images")
        root = path if path.is_dir() else path.parent
        files = list_images(path) if path.is_dir() else [path]
        self.paths = {file.relative_to(root).as_posix(): file for file in files}
        self.image_size = image_size
        self.broken: list[str] = []

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yield (names relative to the source, images (B, 3, H, W) in [0, 1])."""
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
        """The counts of read and broken images."""
        return f"{len(self.paths) - len(self.broken)} images, {len(self.broken)} broken and skipped"


def output_names(names: Sequence[str]) -> dict[str, str]:
    """A PNG name for each input: `b.jpg` -> `b.png`, or `b.jpg.png` where two would collide."""
    stems = {name: str(Path(name).with_suffix("")) for name in names}
    counts = Counter(stems.values())
    return {name: f"{name if counts[stem] > 1 else stem}.png" for name, stem in stems.items()}


def enlarged_grid(rows: list[list[Tensor]], labels: Sequence[str]) -> Image.Image:
    """An image grid, whose images are enlarged if they are small."""
    return image_grid(rows, labels=labels, scale=max(1, 128 // rows[0][0].shape[-1]))


def read_codes(path: str) -> tuple[list[str], Tensor, str]:
    """Names, codes int64 and tokenizer fingerprint of an .npz that `encode` wrote."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = stored["names"].tolist()
            codes = torch.from_numpy(stored["codes"].astype(np.int64))
            fingerprint = str(stored["tokenizer"])
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError, AttributeError) as error:
        why = f"is damaged, or `vqrae encode` did not write it: {error}"
        raise ValueError(f"{path} {why}") from error
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or len(names) != len(codes):
        what = f"{len(names)} names, {len(codes)} codes, names outside of the folder: {outside[:3]}"
        raise ValueError(f"{path} cannot be trusted: {what}")
    return names, codes, fingerprint
