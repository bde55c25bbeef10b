"""What the page does with the codes of one image: read, compare, edit, generate, decode.

Shapes: N patches of an image, n codebooks of K codes with vectors of width w, B images, P side of a
patch. Codes are (N,) of one codebook, (N, n) of several.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqrae.common.images import image_to_tensor, resize_and_crop
from vqrae.generation.generator import Generator
from vqrae.generation.sampling import SamplingConfig
from vqrae.tokenizer.modeling import VQRAEModel

NEIGHBORS = 8  # decoded for a patch, of all its codebooks together
BLANK = 0.93  # grey of what has no code yet
FRAME_SECONDS = 0.03  # between frames of an image that appears: no screen shows more


@dataclass(frozen=True)
class Reading:
    """An image as the tokenizer reads it: (3, H, W) in [0, 1], on the CPU."""

    original: Tensor
    codes: Tensor
    reconstruction: Tensor
    psnr: float
    """In dB."""

    @property
    def difference(self) -> Tensor:
        """Absolute difference, four times as bright (3, H, W)."""
        return ((self.original - self.reconstruction).abs() * 4).clamp(max=1)


@dataclass(frozen=True)
class Neighbor:
    """A code of one codebook, and the patch with it instead of its own."""

    codebook: int
    code: int
    distance: float
    """Between the vectors of the two codes; 0: its own code."""
    image: Tensor
    """The patch and its eight neighbours, (3, 3 P, 3 P) or less at a border."""


@torch.inference_mode()
def read_image(model: VQRAEModel, image: Image.Image) -> Reading:
    """Encode the central square of an image, and decode its codes."""
    size = model.config.image_size
    images = image_to_tensor(resize_and_crop(image, size))[None].to(model.device)
    codes = model.encode(images)
    decoded = model.decode(codes)
    if decoded.shape != images.shape:  # a decoder may have another resolution
        images = F.interpolate(images, decoded.shape[-2:], mode="bicubic", antialias=True)
        images = images.clamp(0, 1)
    error = (images - decoded).square().mean().clamp(min=1e-10)
    psnr = -10 * error.log10().item()
    return Reading(images[0].cpu(), codes[0].cpu(), decoded[0].cpu(), psnr)


@torch.inference_mode()
def decode(model: VQRAEModel, codes: Tensor) -> Tensor:
    """One image (3, H, W) in [0, 1], on the CPU, from its codes."""
    return model.decode(codes[None].to(model.device))[0].cpu()


@torch.inference_mode()
def neighbors(model: VQRAEModel, codes: Tensor, patch: int) -> list[Neighbor]:
    """The code of each codebook at a patch, then the nearest others of that codebook by distance.

    Raises:
        ValueError: for a patch outside the image.
    """
    check_patches(codes, [patch])
    number, size = model.config.num_codebooks, model.config.codebook_size
    tables_nKw = model.code_vectors().reshape(number, size, -1).float()
    own_n = codes.view(len(codes), number)[patch].to(model.device)
    found: list[tuple[int, int, float]] = []
    variants = []
    for codebook, (table_Kw, own) in enumerate(zip(tables_nKw, own_n, strict=True)):
        distances_K = (table_Kw - table_Kw[own]).norm(dim=-1)
        distances_K[own] = -1  # first, also among copies of its vector
        count = min(1 + max(1, NEIGHBORS // number), size)
        nearest = distances_K.topk(count, largest=False)
        for code, distance in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True):
            found.append((codebook, code, max(distance, 0.0)))
            changed = codes.clone()
            changed.view(len(codes), number)[patch, codebook] = code
            variants.append(changed)
    images = model.decode(torch.stack(variants).to(model.device)).cpu()
    crops = around(images, patch, model.config.grid_size)
    return [Neighbor(*each, crop) for each, crop in zip(found, crops, strict=True)]


def around(images: Tensor, patch: int, grid_size: int) -> Tensor:
    """A patch and its eight neighbours, cut out of images (B, 3, H, W)."""
    side = images.shape[-1] // grid_size
    row, column = divmod(patch, grid_size)
    rows = slice(max(row - 1, 0) * side, (row + 2) * side)
    columns = slice(max(column - 1, 0) * side, (column + 2) * side)
    return images[..., rows, columns]


# ---- editing


def paint(codes: Tensor, patches: Sequence[int], brush: Sequence[int]) -> Tensor:
    """The codes with those of the brush, one of each codebook, at all of these patches."""
    check_patches(codes, patches)
    painted = codes.clone()
    painted.view(len(codes), -1)[list(patches)] = torch.tensor(brush)
    return painted


def swap(codes: Tensor, first: int, second: int) -> Tensor:
    """The codes with two patches exchanged."""
    check_patches(codes, [first, second])
    swapped = codes.clone()
    swapped[[first, second]] = codes[[second, first]]
    return swapped


def codes_at(codes: Tensor, patch: int) -> list[int]:
    """The code of each codebook at a patch."""
    check_patches(codes, [patch])
    return codes.view(len(codes), -1)[patch].tolist()


def check_patches(codes: Tensor, patches: Sequence[int]) -> None:
    """Refuse, with ValueError, patches that the image does not have."""
    for patch in patches:
        if not (isinstance(patch, int) and 0 <= patch < len(codes)):
            raise ValueError(f"got patch {patch!r}, expected 0 to {len(codes) - 1}")


def read_brush(text: str, model: VQRAEModel) -> list[int]:
    """The codes that a visitor wrote: numbers with space or commas between them.

    Raises:
        ValueError: for anything but one code of each codebook.
    """
    number, size = model.config.num_codebooks, model.config.codebook_size
    words = text.replace(",", " ").split()
    fits = [re.fullmatch(r"[0-9]{1,9}", word) and int(word) < size for word in words]
    if len(words) != number or not all(fits):
        expected = "a code" if number == 1 else f"{number} codes"
        raise ValueError(f"got {text[:40]!r}, expected {expected} from 0 to {size - 1}")
    return [int(word) for word in words]


# ---- generation


@dataclass(frozen=True)
class Frame:
    """Images on their way: (B, 3, H, W), grey where there is no code yet."""

    images: Tensor
    done: int
    total: int


def generate(
    generator: Generator,
    prompt: str,
    *,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    seconds: float,
) -> Iterator[Frame]:
    """Images of a prompt, code by code: frames as fast as they can be shown, then the result.

    Frames take at most half of the time. Raises ValueError for a request that the generator
    refuses, and after `seconds`.
    """
    started = time.monotonic()
    codes: list[Tensor] = []
    model, total = generator.tokenizer, generator.encode_prompt.vocabulary.num_codes
    shown = cost = 0.0
    steps = generator.codes_in_turn([prompt] * len(seeds), seeds=seeds, sampling=sampling)
    for step in steps:
        codes.append(step)
        now = time.monotonic()
        if len(codes) < total and now - started > seconds:
            done = f"{len(codes)} of {total} codes"
            raise ValueError(f"stopped after {seconds:g} s with {done}: ask for fewer images")
        if len(codes) == total or now - shown >= max(FRAME_SECONDS, cost):
            yield Frame(decode_part(model, codes, total), len(codes), total)
            shown = time.monotonic()
            cost = shown - now


@torch.inference_mode()
def decode_part(model: VQRAEModel, codes: Sequence[Tensor], total: int) -> Tensor:
    """Images (B, 3, H, W) of the first codes (B,) or (B, n), grey in the patches without one."""
    # What fills the missing codes also changes the patches around it: the newest code does least.
    filled = [*codes, *[codes[-1]] * (total - len(codes))]
    images = model.decode(torch.stack(filled, dim=1).to(model.device)).cpu()
    grid = model.config.grid_size
    known = (torch.arange(total) < len(codes)).view(1, 1, grid, grid).float()
    mask = F.interpolate(known, images.shape[-2:])
    return images * mask + BLANK * (1 - mask)
