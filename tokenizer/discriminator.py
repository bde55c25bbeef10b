"""Discriminators by name. A new one is a class here and a line in `build_discriminator`.

Both take images (B, 3, H, W) in [0, 1], not clamped, and judge them in fp32 outside of autocast, as the published codes do.

Shapes: B batch, H W pixels, S logit map side, N visual tokens, D feature width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoModel, PreTrainedModel, ViTConfig

from vqrae.common.config import did_you_mean
from vqrae.tokenizer.perceptual import Normalize

DISCRIMINATORS = ("maskbit", "dino")


def build_discriminator(
    name: str,
    *,
    channels: tuple[int, ...],
    backbone: str = "facebook/dino-vits16",
    random_backbone: bool = False,
) -> nn.Module:
    """The discriminator of that name.

    Args:
        channels: of `maskbit`.
        backbone: of `dino`, a folder or hub id.
        random_backbone: a random ViT-S/16 in its place, so that what it says means nothing.

    Raises:
        ValueError: for an unknown name, listing the known ones.
        FileNotFoundError: when the backbone's weights cannot be reached, saying what to do.
    """
    if name == "maskbit":
        return PatchDiscriminator(channels)
    if name == "dino":
        return DinoDiscriminator(random_vit() if random_backbone else pretrained_vit(backbone))
    raise ValueError(f"unknown discriminator {name!r}. {did_you_mean(name, DISCRIMINATORS)}")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A block in which nothing of `module` gathers gradients; afterwards exactly what did before does again."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# ------------------------------------------------------------------------------------------------------- maskbit


class BlurDownsample(nn.Module):
    """Halve the resolution behind a 4 x 4 binomial filter, so that no aliasing gives an image away."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = row[:, None] * row / row.sum() ** 2
        self.register_buffer("kernel", kernel.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.conv2d(
            hidden, self.kernel, stride=2, padding=1, groups=hidden.shape[1]
        )


class PatchDiscriminator(nn.Module):
    """PatchGAN with blurred downsampling, as in MaskBit (arXiv 2409.16211) and TiTok: logits (B, 1, S, S), one per patch.

    Args:
        channels: width of the stem and of every stage, each of which halves the resolution. TiTok has the three of the
            default, MaskBit a fourth of 1024.
        map_size: largest side of the logit map (adaptive max pooling above it).
    """

    def __init__(
        self, channels: tuple[int, ...] = (128, 128, 256, 512), map_size: int = 16
    ) -> None:
        super().__init__()
        self.map_size = map_size
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels[0], 5, padding=2),
            nn.LeakyReLU(0.1, inplace=True),
        ]
        for before, after in pairwise(channels):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                BlurDownsample(after),
                group_norm(after),
                nn.LeakyReLU(0.1, inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        width, activation = channels[-1], nn.LeakyReLU(0.1, inplace=True)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1), activation, nn.Conv2d(width, 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            hidden = self.body(images.float())
            if hidden.shape[-1] > self.map_size:
                hidden = nn.functional.adaptive_max_pool2d(hidden, self.map_size)
            return self.head(hidden)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, as published; fewer where a small network has less than four channels for each."""
    return nn.GroupNorm(min(32, channels // 4), channels)


# ------------------------------------------------------------------------------------------------------- dino


class Residual(nn.Sequential):
    """A block whose output joins its input at unchanged variance."""

    def forward(self, hidden: Tensor) -> Tensor:
        return (super().forward(hidden) + hidden) / 2**0.5


class DinoDiscriminator(nn.Module):
    """Small heads with spectral normalisation on frozen DINO features of four depths: logits (B, 4, N).

    After StyleGAN-T (arXiv 2301.09515), with UniTok's group norm in place of batch statistics, so that neither the other
    images of a batch nor the number of processes matter; without their augmentation of the discriminator's images.

    Args:
        backbone: a Hugging Face ViT with a class token, frozen here; it sees ImageNet-normalised images of its own size.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone, self.normalize = backbone.eval().requires_grad_(False), Normalize()
        layers, width = backbone.config.num_hidden_layers, backbone.config.hidden_size
        self.depths = [
            layers * quarter // 4 for quarter in (1, 2, 3, 4)
        ]  # behind block 3, 6, 9, 12 of ViT-S
        self.heads = nn.ModuleList(self._head(width) for _ in self.depths)

    @staticmethod
    def _head(width: int) -> nn.Sequential:
        def convolution(channels: int, kernel_size: int) -> nn.Module:
            padding = kernel_size // 2
            return spectral_norm(
                nn.Conv1d(width, channels, kernel_size, padding=padding, padding_mode="circular")
            )

        def block(kernel_size: int) -> list[nn.Module]:
            return [
                convolution(width, kernel_size),
                group_norm(width),
                nn.LeakyReLU(0.2, inplace=True),
            ]

        return nn.Sequential(*block(1), Residual(*block(9)), convolution(1, 1))

    def train(self, mode: bool = True) -> "DinoDiscriminator":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        size = self.backbone.config.image_size
        with torch.autocast(images.device.type, enabled=False):
            resized = nn.functional.interpolate(
                images.float(), size=(size, size), mode="bilinear", antialias=True
            )
            pixel_values = self.normalize(resized)
            states = self.backbone(pixel_values, output_hidden_states=True).hidden_states
            # Every patch is read together with the class token.
            features = [
                (states[depth][:, 1:] + states[depth][:, :1]).transpose(1, 2)
                for depth in self.depths
            ]
            return torch.cat(
                [head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1
            )


def random_vit() -> PreTrainedModel:
    """A random ViT-S/16, the architecture of `facebook/dino-vits16`."""
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    return AutoModel.from_config(config, add_pooling_layer=False)


def pretrained_vit(source: str) -> PreTrainedModel:
    """The ViT of a folder or hub id, with all of its weights.

    Raises:
        FileNotFoundError: when it cannot be reached.
        ValueError: when weights are missing, which would otherwise stay random.
    """
    try:
        model, report = AutoModel.from_pretrained(source, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"the discriminator's backbone {source} cannot be had ({error}): download config.json and model.safetensors of "
            "https://huggingface.co/facebook/dino-vits16 into a folder and set discriminator_backbone to it. A dry run or a "
            "test, where the loss may mean nothing, can set random_perceptual_weights=true instead."
        ) from error
    missing = sorted(
        key for key in report["missing_keys"] if not key.startswith("pooler.")
    )  # nobody reads it
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights, the first is {missing[0]}: take another backbone"
        )
    return model
