"""How a discriminator sees images in training, so that it does not learn them by heart.

DiffAug (arXiv 2006.10738) and the blur that fades, both as StyleGAN-T and UniTok have them. What is
random follows from numbers that come with each image, so neither the batch that an image is in nor
a resume changes how it is seen.

Shapes: B batch, H W pixels, R random numbers of an image.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_VIEWS = 5  # the tokenizer's of its images; the discriminator's two of images and of these
NUM_RANDOM = 10  # R: places and colours of `diff_augment`, then `random_crop`
TRANSLATION = 0.125  # largest, as a share of the side
CUTOUT = 0.2  # side of the grey square, as a share of the image's


def seen(images: Tensor, random_BR: Tensor, blur: float, *, augment: bool, multiple: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as a discriminator sees them, with their gradients.

    Args:
        random_BR: in [0, 1), on the CPU.
        blur: from 1, almost nothing left, to 0, sharp.
        augment: change place and colours at random, and crop to a multiple.
        multiple: what the discriminator's patches divide, see `random_crop`.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = blurred(images.float(), blur) if blur else images
        if not augment:
            return images
        images = diff_augment(images, random_BR[:, :7].to(images.device))
        return random_crop(images, random_BR[:, 7:], multiple)


def blurred(images: Tensor, strength: float) -> Tensor:
    """Gaussian blur over sqrt(H / 2) * strength pixels, after which a pixel counts half."""
    spread = math.sqrt(images.shape[-2] / 2) * strength
    radius = math.floor(3 * spread)
    if radius < 1:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    weights = torch.exp2(-((offsets / spread) ** 2))
    kernel = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, [radius] * 4, mode="reflect")
    rows = F.conv2d(padded, kernel, groups=3)
    return F.conv2d(rows, kernel.mT, groups=3)


def diff_augment(images: Tensor, random_B7: Tensor) -> Tensor:
    """Images shifted, with other brightness, saturation and contrast, and with a grey square.

    Args:
        random_B7: in [0, 1): down, right, brightness, saturation, contrast, and the square's place.
    """
    height, width = images.shape[-2:]
    down, right, brightness, saturation, contrast, top, left = random_B7.T[..., None, None, None]
    pixels = 2 * images - 1  # 0 is grey
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)

    shifts = []
    for share, extent in ((down, height), (right, width)):
        reach = round(extent * TRANSLATION)
        shifts.append((share * (2 * reach + 1)).floor().long().flatten() - reach)
    framed = F.pad(pixels, [1, 1, 1, 1])  # what comes from outside is the frame
    framed_rows = (rows + shifts[0][:, None] + 1).clamp(0, height + 1)
    framed_columns = (columns + shifts[1][:, None] + 1).clamp(0, width + 1)
    pixels = pick(framed, framed_rows, framed_columns)

    pixels = pixels + (brightness - 0.5)
    grey = pixels.mean(1, keepdim=True)
    pixels = (pixels - grey) * (2 * saturation) + grey
    grey = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - grey) * (contrast + 0.5) + grey

    inside = []
    for share, extent, places in ((top, height, rows[:, None]), (left, width, columns)):
        side = round(extent * CUTOUT)
        begin = (share * (extent + 1 - side % 2)).floor().long() - side // 2
        inside.append((begin <= places) & (places < begin + side))
    return (pixels * ~(inside[0] & inside[1]) + 1) / 2


def random_crop(images: Tensor, random_B3: Tensor, multiple: int) -> Tensor:
    """Images whose sides are multiples: cropped or, every second one, shrunk; else as they are.

    Args:
        random_B3: in [0, 1): which of both, top, left.
    """
    height, width = images.shape[-2:]
    sides = height // multiple * multiple, width // multiple * multiple
    if sides == (height, width):
        return images
    shrunk = F.interpolate(images, sides, mode="area")
    choice, top, left = random_B3.to(images.device).T[..., None]
    starts = []
    for share, extent, side in ((top, height, sides[0]), (left, width, sides[1])):
        begin = (share * (extent - side + 1)).floor().long()
        starts.append(begin + torch.arange(side, device=images.device))
    return torch.where((choice <= 0.5)[..., None, None], pick(images, *starts), shrunk)


def pick(images: Tensor, rows_BH: Tensor, columns_BW: Tensor) -> Tensor:
    """The pixels (B, 3, H', W') of images at their own rows (B, H') and columns (B, W')."""
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[batch, rows_BH[:, :, None], columns_BW[:, None]]
    return picked.permute(0, 3, 1, 2)
