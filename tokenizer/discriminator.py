"""Discriminators by name. A new one is a class here and a line in `build_discriminator`.

They take images (B, 3, H, W) in [0, 1], not clamped, and compute in fp32 outside of autocast, as
the published codes do.

Shapes: B batch, H W pixels, S side of a logit map, N visual tokens, D feature width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoModel, Dinov2Config, PreTrainedConfig, PreTrainedModel, ViTConfig

from vqrae.common.config import did_you_mean
from vqrae.tokenizer.perceptual import Normalize

DISCRIMINATORS = ("maskbit", "dino", "dinov2")


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
        backbone: of `dino` and `dinov2`, a folder or hub id.
        random_backbone: a random ViT-S in its place, whose logits mean nothing.

    Raises:
        ValueError: for an unknown name, listing the known ones.
        FileNotFoundError: when the backbone's weights cannot be reached, saying what to do.
    """
    if name == "maskbit":
        return PatchDiscriminator(channels)
    if name == "dino":
        return DinoDiscriminator(random_vit() if random_backbone else pretrained_vit(backbone))
    if name == "dinov2":
        vit = random_vit(Dinov2Config(image_size=518)) if random_backbone else None
        return DinoV2Discriminator(vit or pretrained_vit(backbone))
    raise ValueError(f"unknown discriminator {name!r}. {did_you_mean(name, DISCRIMINATORS)}")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A block in which no parameter of `module` collects gradients; then the same ones do again."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """32 groups, as published; fewer in small networks, so that a group has four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


# ------------------------------------------------------------------------------------------ maskbit


class BlurDownsample(nn.Module):
    """Halve the resolution after a 4 x 4 binomial filter: aliasing would give images away."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = row[:, None] * row / row.sum() ** 2
        self.register_buffer("kernel", kernel.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.conv2d(hidden, self.kernel, stride=2, padding=1, groups=hidden.shape[1])


class PatchDiscriminator(nn.Module):
    """Blurred PatchGAN of MaskBit (arXiv 2409.16211) and TiTok: logits (B, 1, S, S).

    Args:
        channels: width of the stem and of each stage, which halves the resolution. The default is
            TiTok's; MaskBit has a fourth stage of 1024.
        map_size: largest S; larger maps are max-pooled.
    """

    multiple = 1
    """What the sides of its images are a multiple of after a random crop."""

    def __init__(
        self, channels: tuple[int, ...] = (128, 128, 256, 512), map_size: int = 16
    ) -> None:
        super().__init__()
        self.map_size = map_size
        activation = nn.LeakyReLU(0.1, inplace=True)
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 5, padding=2), activation]
        for before, after in pairwise(channels):
            convolution = nn.Conv2d(before, after, 3, padding=1)
            layers += [convolution, BlurDownsample(after), group_norm(after), activation]
        self.body = nn.Sequential(*layers)
        width = channels[-1]
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1), activation, nn.Conv2d(width, 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            hidden = self.body(images.float())
            if hidden.shape[-1] > self.map_size:
                hidden = F.adaptive_max_pool2d(hidden, self.map_size)
            return self.head(hidden)


# --------------------------------------------------------------------------------------------- dino


class Residual(nn.Sequential):
    """A block whose output is added to its input at unchanged variance."""

    def forward(self, hidden: Tensor) -> Tensor:
        return (super().forward(hidden) + hidden) / 2**0.5


def dino_head(width: int, *, spectral: bool = True, eps: float = 1e-5) -> nn.Sequential:
    """Features (B, D, N) -> logits (B, 1, N).

    Args:
        spectral: whether convolutions have spectral norm.
        eps: of the group norm.
    """

    def convolution(channels: int, kernel: int) -> nn.Module:
        padding = kernel // 2
        layer = nn.Conv1d(width, channels, kernel, padding=padding, padding_mode="circular")
        return spectral_norm(layer) if spectral else layer

    def block(kernel: int) -> list[nn.Module]:
        norm = group_norm(width, eps)
        return [convolution(width, kernel), norm, nn.LeakyReLU(0.2, inplace=True)]

    return nn.Sequential(*block(1), Residual(*block(9)), convolution(1, 1))


class DinoDiscriminator(nn.Module):
    """Small spectrally normalised heads on frozen DINO features of four depths: logits (B, 4, N).

    After StyleGAN-T (arXiv 2301.09515), without its augmentation, and with UniTok's group norm for
    batch statistics, so that neither the rest of the batch nor the number of processes matters.

    Args:
        backbone: a ViT with a class token, frozen here; it sees ImageNet-normalised images of its
            own size.
    """

    multiple = 1

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.normalize = Normalize()
        layers, width = backbone.config.num_hidden_layers, backbone.config.hidden_size
        self.depths = [layers * quarter // 4 for quarter in (1, 2, 3, 4)]  # 3, 6, 9, 12 of ViT-S
        self.heads = nn.ModuleList(dino_head(width) for _ in self.depths)

    def train(self, mode: bool = True) -> "DinoDiscriminator":
        super().train(mode)
        self.backbone.eval()
        return self

    def resize(self, images: Tensor) -> Tensor:
        """Images of the size that the backbone sees."""
        size = self.backbone.config.image_size
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            resized = self.normalize(self.resize(images.float()))
            output = self.backbone(resized, output_hidden_states=True)
            logits = []
            for depth, head in zip(self.depths, self.heads, strict=True):
                state_BND = output.hidden_states[depth]
                # Each patch is read together with the class token.
                features_BDN = (state_BND[:, 1:] + state_BND[:, :1]).transpose(1, 2)
                logits.append(head(features_BDN))
            return torch.cat(logits, dim=1)


class DinoV2Discriminator(DinoDiscriminator):
    """UniTok's: heads without spectral norm on DINOv2 features of five depths: logits (B, 5, N).

    Args:
        backbone: a DINOv2, frozen here; it sees images of any size, cut to whole patches.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__(backbone)
        self.multiple = backbone.config.patch_size
        self.depths = [1, *self.depths]
        width = backbone.config.hidden_size
        heads = [dino_head(width, spectral=False, eps=1e-6) for _ in self.depths]
        self.heads = nn.ModuleList(heads)
        for module in self.heads.modules():
            if isinstance(module, nn.Conv1d) and module.bias is not None:
                nn.init.xavier_normal_(module.weight, gain=0.5)
                nn.init.zeros_(module.bias)

    def resize(self, images: Tensor) -> Tensor:
        sides = [side // self.multiple * self.multiple for side in images.shape[-2:]]
        return F.interpolate(images, sides, mode="area")


def random_vit(config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A random ViT-S: by default ViT-S/16, the architecture of `facebook/dino-vits16`."""
    config = config or ViTConfig(intermediate_size=1536)
    config.update({"hidden_size": 384, "num_attention_heads": 6})
    options = {"add_pooling_layer": False} if isinstance(config, ViTConfig) else {}
    return AutoModel.from_config(config, **options)


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
            f"the discriminator's backbone {source} cannot be loaded ({error}): download "
            "config.json and model.safetensors of https://huggingface.co/facebook/dino-vits16 (of "
            "dinov2-small for dinov2) into a folder and set discriminator_backbone to it. A dry "
            "run or a test, where the loss may mean nothing, can set "
            "random_perceptual_weights=true instead."
        ) from error
    # Nobody reads the pooler.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights, the first is {missing[0]}")
    return model
