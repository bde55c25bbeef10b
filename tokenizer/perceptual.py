"""Perceptual distances by name: networks that never train, and are random only on request.

The published term is TiTok's `lpips-convnext_s-1.0-0.1` (VQRAE Table 7 through its code lineage):
the weighted mean of LPIPS and of the squared difference of ConvNeXt-S logits. Both take unclamped
images and compute in fp32 outside of autocast: bf16 would round their small differences away.

`encoder` compares features of the frozen original encoder. It needs no download, so the embedded
default uses it; because the same network is then encoder, teacher and loss, it is never a metric.

All take images (B, 3, H, W) in [0, 1] and give a scalar; only the reconstruction gets a gradient.
"""

import pickle
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import (
    ConvNeXt_Small_Weights,
    VGG16_Weights,
    WeightsEnum,
    alexnet,
    convnext_small,
    vgg,
)
from transformers import PreTrainedModel

from vqrae.common.config import did_you_mean


class Normalize(nn.Module):
    """Images (B, 3, H, W) minus a mean, over a deviation, per channel; ImageNet's by default.

    They are buffers, because a list would be copied to the device in every call: a host sync.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class EncoderPerceptual(nn.Module):
    """Mean squared distance of layer-normalised hidden states of the encoder, over all layers."""

    def __init__(self, encoder: PreTrainedModel, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.normalize = encoder, normalize

    def _states(self, images: Tensor) -> list[Tensor]:
        states = self.encoder(self.normalize(images), output_hidden_states=True).hidden_states[1:]
        return [F.layer_norm(state.float(), state.shape[-1:]) for state in states]

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._states(images)
        pairs = zip(self._states(reconstruction), targets, strict=True)
        return torch.stack([F.mse_loss(state, target) for state, target in pairs]).mean()


# Where LPIPS cuts torchvision's `features` into five parts, and the channels after each. The parts
# end in relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of VGG16, in the five ReLUs of AlexNet.
LPIPS_BOUNDS = {"vgg": (0, 4, 9, 16, 23, 30), "alex": (0, 2, 5, 8, 10, 12)}
LPIPS_CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


class LPIPS(nn.Module):
    """LPIPS 0.1 (arXiv 1801.03924) at the size of the images; random until weights are loaded.

    Args:
        backbone: `vgg` (VGG16) for training; `alex` (AlexNet) is a metric too.
    """

    def __init__(self, backbone: Literal["vgg", "alex"] = "vgg") -> None:
        super().__init__()
        self.backbone, self.bounds = backbone, LPIPS_BOUNDS[backbone]
        if backbone == "vgg":
            layers = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
        else:
            layers = alexnet().features
        self.features = layers[: self.bounds[-1]]
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, 1, 1, bias=False) for channels in LPIPS_CHANNELS[backbone]
        )
        # ImageNet's statistics for images in [-1, 1], to the digits that the heads were fitted to.
        self.normalize = Normalize((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Load a torchvision state dict of the backbone, and the linear heads of torchmetrics."""
        folder = resources.files("torchmetrics") / "functional" / "image" / "lpips_models"
        with resources.as_file(folder / f"{self.backbone}.pth") as path:
            heads = torch.load(path, map_location="cpu", weights_only=True)
        own = {key: state[key] for key in self.state_dict() if key.startswith("features.")}
        for i in range(len(self.heads)):
            own[f"heads.{i}.weight"] = heads[f"lin{i}.model.1.weight"]
        self.load_state_dict(own)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        layers = self._differences(reconstruction, images)
        return torch.stack([layer.mean() for layer in layers]).sum()

    def per_image(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The distance of each image: (B,)."""
        layers = self._differences(reconstruction, images)
        return torch.stack([layer.mean((1, 2, 3)) for layer in layers]).sum(0)

    def _differences(self, reconstruction: Tensor, images: Tensor) -> list[Tensor]:
        """Weighted squared differences of each layer, (B, 1, H', W')."""
        with torch.autocast(images.device.type, enabled=False):
            hidden, target = (self.normalize(2 * x.float() - 1) for x in (reconstruction, images))
            differences = []
            for (start, end), head in zip(pairwise(self.bounds), self.heads, strict=True):
                hidden = self.features[start:end](hidden)
                with torch.no_grad():
                    target = self.features[start:end](target)
                differences.append(head((self._unit(hidden) - self._unit(target)).square()))
            return differences

    @staticmethod
    def _unit(hidden: Tensor) -> Tensor:
        return hidden / (hidden.square().sum(1, keepdim=True) + 1e-8).sqrt()


class ConvNeXtLogits(nn.Module):
    """Mean squared difference of ConvNeXt-S ImageNet logits at 224 px (TiTok, MaskBit)."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.normalize = convnext_small(), Normalize()

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Load a torchvision state dict."""
        self.network.load_state_dict(state)

    def _logits(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True)
        return self.network(self.normalize(resized))

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                target = self._logits(images)
            return F.mse_loss(self._logits(reconstruction), target)


class PerceptualMix(nn.Module):
    """Weighted mean of perceptual distances, as TiTok parametrises it.

    With weights (1.0, 0.1) and `perceptual_weight` 1.1 the loss is `1.0 * first + 0.1 * second`.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.networks, self.weights = nn.ModuleList(networks), tuple(weights)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        pairs = zip(self.weights, self.networks, strict=True)
        terms = [weight * network(reconstruction, images) for weight, network in pairs]
        return torch.stack(terms).sum() / sum(self.weights)


PRETRAINED: dict[str, tuple[type[LPIPS | ConvNeXtLogits], WeightsEnum]] = {
    "lpips": (LPIPS, VGG16_Weights.IMAGENET1K_V1),
    "convnext_s": (ConvNeXtLogits, ConvNeXt_Small_Weights.IMAGENET1K_V1),
}


def build_perceptual(
    name: str,
    mix: Sequence[float] = (),
    *,
    teacher: PreTrainedModel | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
    folder: str | None = None,
    random: bool = False,
) -> nn.Module:
    """The frozen perceptual network of that name, or the weighted mean of several.

    Args:
        name: `encoder`, `lpips` or `convnext_s`, or some of them joined by `+`.
        mix: one weight for each of several names.
        teacher, normalize: of `encoder`: the frozen original encoder and its input normalisation.
        folder: with the pretrained weights; None: torch's cache, or a download into it.
        random: leave the weights random, so that the distance means nothing.

    Raises:
        ValueError: for an unknown name, listing the known ones.
        FileNotFoundError: when weights cannot be reached, saying which and what to do.
    """
    networks: list[nn.Module] = []
    for part in name.split("+"):
        if part == "encoder":
            assert teacher is not None, "`encoder` compares features of the teacher"
            assert normalize is not None, "`encoder` needs the teacher's normalisation"
            networks.append(EncoderPerceptual(teacher, normalize))
        elif part in PRETRAINED:
            kind, weights = PRETRAINED[part]
            network = kind()
            if not random:
                network.load_backbone(pretrained_weights(weights, folder))
            networks.append(network)
        else:
            known = did_you_mean(part, ["encoder", *PRETRAINED])
            raise ValueError(f"unknown perceptual network {part!r}. {known}")
    loss = PerceptualMix(networks, mix) if len(networks) > 1 else networks[0]
    return loss.eval().requires_grad_(False)


def pretrained_weights(weights: WeightsEnum, folder: str | None) -> dict[str, Tensor]:
    """The state dict of torchvision `weights`, from `folder`, or torch's cache, or a download.

    Raises:
        FileNotFoundError: when they cannot be reached.
        ValueError: when the file is damaged.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = Path(folder or cache) / weights.url.rpartition("/")[2]
    try:
        if not folder and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            digits = file.stem.rpartition("-")[2]  # of the SHA-256
            torch.hub.download_url_to_file(weights.url, str(file), hash_prefix=digits)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        other = "" if folder else ", or in any folder that perceptual_weights=FOLDER names"
        raise FileNotFoundError(
            f"{weights} cannot be loaded ({error}): download {weights.url} and save it as {file}"
            f"{other}. A dry run or a test, where the loss may mean nothing, can set "
            "random_perceptual_weights=true instead."
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): remove it and download {weights.url} again"
        ) from error
