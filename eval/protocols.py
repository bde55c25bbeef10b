"""Reconstruction scores of different repositories do not compare, because their protocols differ. Each has a name here.

A protocol decides how pictures are brought to the model's size, what becomes of a reconstruction's fractional grey levels
before the metrics see it, and which SSIM is meant. `standard` is what a saved reconstruction holds and the textbook's SSIM;
the others imitate public evaluators, for a line in somebody's table. What each imitates was read in the evaluators' code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from vqrae.common.config import did_you_mean
from vqrae.common.pictures import picture_to_tensor, tensor_to_picture

Resize = Literal["bicubic_crop", "bilinear_crop", "aliased_bilinear_crop", "adm_crop", "bicubic_squash"]
Rounding = Literal["round", "truncate", "none"]
SSIMWindow = Literal["gaussian_11", "uniform_7"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is done to pictures and reconstructions before they are compared."""

    resize: Resize = "bicubic_crop"
    """From a picture file to the model's square: shorter edge to the side and centre crop (bicubic or bilinear, antialiased
    or aliased), ADM's (halve by boxes, then bicubic, then crop), or a squash that forgets the aspect ratio."""
    rounding: Rounding = "round"
    """From [0, 1] to 256 levels, for PSNR, SSIM and LPIPS."""
    network_rounding: Rounding = "round"
    """The same for what the Inception network sees."""
    score_size: int | None = None
    """Both pictures are resized to this side before they are compared (bilinear without antialiasing); None: the input's."""
    ssim_window: SSIMWindow = "gaussian_11"
    """11 x 11 Gaussian of sigma 1.5 (Wang et al. 2004), or scikit-image's default: 7 x 7, uniform, sample covariance."""
    ssim_data_range: float = 1.0
    """Pictures are in [0, 1], so 1 is right; 2 inflates, and is given as `ssim_range_2` beside `ssim`, never in its place."""


PROTOCOLS: dict[str, Protocol] = {
    "standard": Protocol(),
    # 1d-tokenizer: its evaluator truncates, but its loop has rounded before. It has no PSNR and SSIM; scikit-image's stand in.
    "titok": Protocol(ssim_window="uniform_7"),
    # hustvl/VGT, the sibling of VQRAE: truncates; 448 and 512 px are compared at 256; SSIM of range 2 on pictures in [0, 1].
    "vgt": Protocol(
        rounding="truncate", network_rounding="truncate", score_size=256, ssim_window="uniform_7", ssim_data_range=2.0
    ),
    # The same repository's script outside of training squashes pictures. (Its cast of the originals to bf16 is left out.)
    "vgt_script": Protocol(
        resize="bicubic_squash",
        rounding="truncate",
        network_rounding="truncate",
        score_size=256,
        ssim_window="uniform_7",
        ssim_data_range=2.0,
    ),
    # MaskBit: PSNR and SSIM on unrounded values; its SSIM also counts a border padded by reflection, ours does not.
    "maskbit": Protocol(resize="bilinear_crop", rounding="none", network_rounding="truncate"),
    # LlamaGen: ADM's crop; `127.5 x + 128` truncated is rounding; SSIM of range 2 as in VGT.
    "llamagen": Protocol(resize="adm_crop", ssim_window="uniform_7", ssim_data_range=2.0),
    # RAE: ADM's crop, truncates. It publishes no SSIM; scikit-image's stands in.
    "rae": Protocol(resize="adm_crop", rounding="truncate", network_rounding="truncate", ssim_window="uniform_7"),
    # SEED-Voken (Open-MAGVIT2, IBQ): the Inception network sees unrounded values, PSNR and SSIM truncated ones.
    "seed_voken": Protocol(
        resize="aliased_bilinear_crop", rounding="truncate", network_rounding="none", ssim_window="uniform_7"
    ),
}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}. {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


# ---- from files to the model's square


def _fit(resample: Image.Resampling) -> Callable[[Image.Image, int], Image.Image]:
    return lambda picture, size: ImageOps.fit(picture, (size, size), method=resample)


def _center_crop(picture: Image.Image, size: int) -> Image.Image:
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _shorter_edge(picture: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) with the shorter edge at `size`."""
    scale = size / min(picture.size)
    return max(size, round(picture.width * scale)), max(size, round(picture.height * scale))


def _aliased_bilinear_crop(picture: Image.Image, size: int) -> Image.Image:
    width, height = _shorter_edge(picture, size)
    pixels = F.interpolate(picture_to_tensor(picture)[None], (height, width), mode="bilinear", align_corners=False)[0]
    return _center_crop(tensor_to_picture(pixels), size)


def _adm_crop(picture: Image.Image, size: int) -> Image.Image:
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return _center_crop(picture.resize(_shorter_edge(picture, size), Image.Resampling.BICUBIC), size)


def _bicubic_squash(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BICUBIC)


RESIZES: dict[Resize, Callable[[Image.Image, int], Image.Image]] = {
    "bicubic_crop": _fit(Image.Resampling.BICUBIC),
    "bilinear_crop": _fit(Image.Resampling.BILINEAR),
    "aliased_bilinear_crop": _aliased_bilinear_crop,
    "adm_crop": _adm_crop,
    "bicubic_squash": _bicubic_squash,
}


def resize_picture(picture: Image.Image, size: int, resize: Resize) -> Image.Image:
    """RGB picture of any size -> size x size; one that has it already stays as it is."""
    return picture if picture.size == (size, size) else RESIZES[resize](picture, size)


# ---- from the model to the metrics


def to_score_size(images: Tensor, protocol: Protocol, side: int) -> Tensor:
    """Images (B, 3, H, W) at the size of the comparison: the protocol's, or `side`.

    Where no size is named, a reconstruction of another size than its original is resized with antialiasing.
    """
    size = protocol.score_size or side
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=protocol.score_size is None)


def round_levels(images: Tensor, rounding: Rounding) -> Tensor:
    """Images in [0, 1], clamped, at k/255 by rounding or by truncation; `none` leaves what lies between."""
    images = images.float().clamp(0, 1)
    if rounding == "round":
        return (images * 255).round() / 255
    if rounding == "truncate":
        return (images * 255).floor() / 255
    return images


def ssim(images: Tensor, copies: Tensor, window: SSIMWindow, data_range: float) -> Tensor:
    """Structural similarity of images (B, 3, H, W), one value per picture (B,)."""
    if window == "gaussian_11":
        from torchmetrics.functional.image import structural_similarity_index_measure

        values = structural_similarity_index_measure(
            copies, images, kernel_size=11, sigma=1.5, reduction="none", data_range=data_range
        )
        return torch.as_tensor(values).reshape(-1)
    return _uniform_ssim(images.double(), copies.double(), data_range)


def _uniform_ssim(a: Tensor, b: Tensor, data_range: float, side: int = 7) -> Tensor:
    """What scikit-image's `structural_similarity` gives by default, which torchmetrics does not offer.

    Means over windows that lie wholly inside; (co)variances of samples, hence n / (n - 1); mean over channels and windows.
    """
    unbiased = side**2 / (side**2 - 1)
    stacked = torch.cat([a, b, a * a, b * b, a * b])
    mean_a, mean_b, aa, bb, ab = F.avg_pool2d(stacked, side, stride=1).chunk(5)
    var_a, var_b = unbiased * (aa - mean_a**2), unbiased * (bb - mean_b**2)
    covariance = unbiased * (ab - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    values = numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return values.flatten(1).mean(1)
