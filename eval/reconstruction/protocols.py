"""Reconstruction scores of different repositories do not compare, because their protocols differ. Each has a name here.

A protocol decides how images are brought to the model's size, what becomes of a reconstruction's fractional grey levels
before the metrics see it, and which SSIM is meant. `standard` is what a saved reconstruction holds and the textbook's SSIM;
the others imitate public evaluators, for a line in somebody's table. What each imitates was read in
the evaluators' code, at the commit that its comment names. Their `Resize` and `CenterCrop` put the
crop at whole pixels of the resized image, ours at fractions of the original's: the two differ by
less than a pixel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from vqrae.common.config import did_you_mean

Resize = Literal["bicubic_crop", "bilinear_crop", "adm_crop"]
Rounding = Literal["round", "truncate", "none"]
SSIMWindow = Literal["gaussian_11", "gaussian_11_padded", "uniform_7"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is done to images and reconstructions before they are compared."""

    resize: Resize = "bicubic_crop"
    """From a file to the model's square: shorter edge to the side and centre crop (bicubic or
    bilinear, antialiased), or ADM's (halve by boxes, then bicubic, then crop)."""
    rounding: Rounding = "round"
    """From [0, 1] to 256 levels, for PSNR, SSIM and LPIPS."""
    network_rounding: Literal["round", "truncate"] = "round"
    """The same for the networks of Fréchet distances, which see 8-bit levels."""
    score_size: int | None = None
    """Both images are resized to this side before they are compared (bilinear without antialiasing); None: the input's."""
    ssim_window: SSIMWindow = "gaussian_11"
    """11 x 11 Gaussian of sigma 1.5 where it fits (Wang et al. 2004); the same with a border that is
    padded by reflection (torchmetrics); or scikit-image's default: 7 x 7, uniform, samples'
    covariance."""
    ssim_data_range: float = 1.0
    """Images are in [0, 1], so 1 is right; 2 inflates, and is given as `ssim_range_2` beside `ssim`, never in its place."""


PROTOCOLS: dict[str, Protocol] = {
    "standard": Protocol(),
    # bytedance/1d-tokenizer 942a96f: evaluator/evaluator.py truncates, but eval_reconstruction in
    # utils/train_utils.py has rounded before. It has no PSNR and no SSIM; scikit-image's stand in.
    "titok": Protocol(ssim_window="uniform_7"),
    # hustvl/VGT 56bd80e, the sibling of VQRAE: eval_reconstruction in
    # tokenizer/utils/train_vgtae_imagenet_utils.py compares at 256; tokenizer/evaluator/evaluator.py
    # takes PSNR and SSIM (range 2, on [0, 1]) of unrounded values and truncates for Inception. Left
    # out: the normalisation by ImageNet's statistics and back, after which truncation costs a
    # quarter of the originals' levels one step.
    "vgt": Protocol(
        rounding="none",
        network_rounding="truncate",
        score_size=256,
        ssim_window="uniform_7",
        ssim_data_range=2.0,
    ),
    # markweberdev/maskbit 5ea3d73, evaluator/evaluator.py: PSNR, SSIM and LPIPS on unrounded values;
    # truncates for Inception.
    "maskbit": Protocol(
        resize="bilinear_crop",
        rounding="none",
        network_rounding="truncate",
        ssim_window="gaussian_11_padded",
    ),
    # FoundationVision/LlamaGen ce98ec4, tokenizer/tokenizer_image/reconstruction_vq_ddp.py: ADM's
    # crop; `127.5 x + 128` truncated is rounding; SSIM of range 2 on [0, 1].
    "llamagen": Protocol(resize="adm_crop", ssim_window="uniform_7", ssim_data_range=2.0),
    # bytetriper/RAE a4d18c4, src/eval/__init__.py and ref_iqa.py: ADM's crop, truncates, SSIM by
    # torchmetrics.
    "rae": Protocol(
        resize="adm_crop",
        rounding="truncate",
        network_rounding="truncate",
        ssim_window="gaussian_11_padded",
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
    return lambda image, size: ImageOps.fit(image, (size, size), method=resample)


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _shorter_edge(image: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) with the shorter edge at `size`."""
    scale = size / min(image.size)
    return max(size, round(image.width * scale)), max(size, round(image.height * scale))


def _adm_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _center_crop(image.resize(_shorter_edge(image, size), Image.Resampling.BICUBIC), size)


RESIZES: dict[Resize, Callable[[Image.Image, int], Image.Image]] = {
    "bicubic_crop": _fit(Image.Resampling.BICUBIC),
    "bilinear_crop": _fit(Image.Resampling.BILINEAR),
    "adm_crop": _adm_crop,
}


def resize_image(image: Image.Image, size: int, resize: Resize) -> Image.Image:
    """RGB image of any size -> size x size; one that has it already stays as it is."""
    return image if image.size == (size, size) else RESIZES[resize](image, size)


# ---- from the model to the metrics


def to_score_size(images: Tensor, protocol: Protocol, side: int) -> Tensor:
    """Images (B, 3, H, W) at the size of the comparison: the protocol's, or `side`.

    Where no size is named, a reconstruction of another size than its original is resized with antialiasing.
    """
    size = protocol.score_size or side
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(
        images,
        (size, size),
        mode="bilinear",
        align_corners=False,
        antialias=protocol.score_size is None,
    )


def round_levels(images: Tensor, rounding: Rounding) -> Tensor:
    """Images in [0, 1], clamped, at k/255 by rounding or by truncation; `none` leaves what lies between."""
    images = images.float().clamp(0, 1)
    if rounding == "round":
        return (images * 255).round() / 255
    if rounding == "truncate":
        return (images * 255).floor() / 255
    return images


def ssim(images: Tensor, copies: Tensor, window: SSIMWindow, data_range: float) -> Tensor:
    """Structural similarity of images (B, 3, H, W), one value per image (B,).

    The mean over channels and windows, in float64, since variances are differences of means of
    squares. Equals scikit-image's `structural_similarity`; for `gaussian_11`, that with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.

    Raises:
        ValueError: for images smaller than the window.
    """
    weights, unbiased = _window(window)
    side = len(weights)
    if min(images.shape[-2:]) < side:
        height, width = images.shape[-2:]
        raise ValueError(
            f"got images of {height} x {width}, expected at least {side} pixels for SSIM"
        )
    a, b = images.double(), copies.double()
    if window == "gaussian_11_padded":
        a, b = (F.pad(batch, [side // 2] * 4, mode="reflect") for batch in (a, b))
    mean_a, mean_b, aa, bb, ab = (
        _windowed(batch, weights) for batch in (a, b, a * a, b * b, a * b)
    )
    var_a, var_b = unbiased * (aa - mean_a**2), unbiased * (bb - mean_b**2)
    covariance = unbiased * (ab - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    values = numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return values.flatten(1).mean(1)


def _window(name: SSIMWindow) -> tuple[list[float], float]:
    """Weights along one axis, which sum to 1, and the factor from their variance to the one that is meant."""
    if name == "uniform_7":
        return [1 / 7] * 7, 49 / 48  # of samples: n / (n - 1)
    weights = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in range(-5, 6)]
    return [weight / sum(weights) for weight in weights], 1.0


def _windowed(images: Tensor, weights: list[float]) -> Tensor:
    """Weighted means (B, C, H', W') over the square windows that fit into images (B, C, H, W)."""
    for axis in (-2, -1):
        places = images.shape[axis] - len(weights) + 1
        total = weights[0] * images.narrow(axis, 0, places)
        # Shifted sums take a third of the time of float64 convolutions on CPU.
        for i, weight in enumerate(weights[1:], start=1):
            total.add_(images.narrow(axis, i, places), alpha=weight)
        images = total
    return images
