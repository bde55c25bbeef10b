"""Protocols: how images are resized, rounded and compared. Scores of different ones do not compare.

`standard` scores what a saved reconstruction holds, with the textbook's SSIM; the others imitate
public evaluators, as read in their code at the commit that the comment names. Their `Resize` and
`CenterCrop` crop at whole pixels of the resized image, ours at fractions of the original's pixels:
the two differ by less than a pixel.
"""

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

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
    """Side that both images are resized to (bilinear, not antialiased); None: the input's."""
    ssim_window: SSIMWindow = "gaussian_11"
    """11 x 11 Gaussian of sigma 1.5 where it fits (Wang et al. 2004); the same with a reflected
    border (torchmetrics); or scikit-image's default: 7 x 7, uniform, samples' covariance."""
    ssim_data_range: float = 1.0
    """Images are in [0, 1], so 1 is right. A range of 2 inflates; it is reported as `ssim_range_2`
    next to `ssim`, never in its place."""


PROTOCOLS: dict[str, Protocol] = {
    "standard": Protocol(),
    # bytedance/1d-tokenizer 942a96f: evaluator/evaluator.py truncates, but eval_reconstruction in
    # utils/train_utils.py has rounded before. It has no PSNR or SSIM; we take scikit-image's.
    "titok": Protocol(ssim_window="uniform_7"),
    # hustvl/VGT 56bd80e, the sibling of VQRAE: eval_reconstruction in
    # tokenizer/utils/train_vgtae_imagenet_utils.py compares at 256; evaluator/evaluator.py takes
    # PSNR and SSIM (range 2, on [0, 1]) of unrounded values and truncates for Inception. We
    # leave out its normalisation by ImageNet's statistics and back, after which truncation costs a
    # quarter of the originals' levels one step.
    "vgt": Protocol(
        rounding="none",
        network_rounding="truncate",
        score_size=256,
        ssim_window="uniform_7",
        ssim_data_range=2.0,
    ),
    # markweberdev/maskbit 5ea3d73, evaluator/evaluator.py: PSNR, SSIM and LPIPS of unrounded
    # values; truncates for Inception.
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


# ---- from files to the model's square


def _adm_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = max(size, round(image.width * scale))
    height = max(size, round(image.height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_image(image: Image.Image, size: int, resize: Resize) -> Image.Image:
    """RGB image of any size -> size x size; one that has this size stays as it is."""
    if image.size == (size, size):
        return image
    if resize == "adm_crop":
        return _adm_crop(image, size)
    filters = {"bicubic_crop": Image.Resampling.BICUBIC, "bilinear_crop": Image.Resampling.BILINEAR}
    return ImageOps.fit(image, (size, size), method=filters[resize])


# ---- from the model to the metrics


def to_score_size(images: Tensor, protocol: Protocol, side: int) -> Tensor:
    """Images (B, 3, H, W) at the size of the comparison: the protocol's, or `side`.

    Without a size in the protocol, reconstructions of another size are resized with antialiasing.
    """
    size = protocol.score_size or side
    if images.shape[-2:] == (size, size):
        return images
    antialias = protocol.score_size is None
    return F.interpolate(images, (size, size), mode="bilinear", antialias=antialias)


def round_levels(images: Tensor, rounding: Rounding) -> Tensor:
    """Images clamped to [0, 1], at k/255 by rounding or truncation; `none` keeps values between."""
    images = images.float().clamp(0, 1)
    if rounding == "round":
        return (images * 255).round() / 255
    if rounding == "truncate":
        return (images * 255).floor() / 255
    return images
