"""Perceptual distances by name: networks that never train and never start from random weights unasked.

The published term is TiTok's `lpips-convnext_s-1.0-0.1` (VQRAE Table 7 through its code lineage): LPIPS-VGG and the squared
difference of ConvNeXt-S logits, in a weighted mean. Both see unclamped fp32 images outside of autocast, for bf16 would round
away the small differences that they measure.

`encoder` compares the features that the frozen original encoder sees. It needs no download, which is why the embedded
default uses it; the same network is then encoder, teacher and loss, so it is never a *metric* beside them.
"""

import pickle
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
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
    """Images (B, 3, H, W) minus a mean, over a deviation, both of channels and kept on the device: a list would be copied
    there in every call, and the host would wait. They are ImageNet's for images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class EncoderPerceptual(nn.Module):
    """Mean squared distance of the encoder's hidden states, each layer-normalised, averaged over layers."""

    def __init__(self, encoder: PreTrainedModel, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.normalize = encoder, normalize

    def _states(self, images: Tensor) -> list[Tensor]:
        states = self.encoder(self.normalize(images), output_hidden_states=True).hidden_states[1:]
        return [nn.functional.layer_norm(state.float(), state.shape[-1:]) for state in states]

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Scalar distance of images (B, 3, H, W) in [0, 1]; gradient through the reconstruction only."""
        with torch.no_grad():
            targets = self._states(images)
        pairs = zip(self._states(reconstruction), targets, strict=True)
        return torch.stack(
            [nn.functional.mse_loss(state, target) for state, target in pairs]
        ).mean()


# Where LPIPS cuts torchvision's `features` into five parts, and the channels after each. The parts
# end in relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of VGG16, in the five ReLUs of AlexNet.
LPIPS_BOUNDS = {"vgg": (0, 4, 9, 16, 23, 30), "alex": (0, 2, 5, 8, 10, 12)}
LPIPS_CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


class LPIPS(nn.Module):
    """LPIPS 0.1 (arXiv 1801.03924) at the resolution of the images; random until weights are loaded.

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
        # ImageNet's statistics for images in [-1, 1], with the digits that the heads were fitted to.
        self.normalize = Normalize((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))

    def load_pretrained(self, folder: str | None) -> None:
        """Load torchvision's VGG16 (see `pretrained_weights`) and the linear heads."""
        self.load_backbone(pretrained_weights(VGG16_Weights.IMAGENET1K_V1, folder))

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
        """Mean LPIPS of images (B, 3, H, W) in [0, 1]; gradient through the reconstruction only."""
        layers = self._differences(reconstruction, images)
        return torch.stack([layer.mean() for layer in layers]).sum()

    def per_image(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The same for each image: (B,)."""
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
    """Mean squared difference of ConvNeXt-S ImageNet logits at 224 px (TiTok, MaskBit); random until `load_pretrained`."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.normalize = convnext_small(), Normalize()

    def load_pretrained(self, folder: str | None) -> None:
        """Load torchvision's ConvNeXt-S (see `pretrained_weights`)."""
        self.network.load_state_dict(
            pretrained_weights(ConvNeXt_Small_Weights.IMAGENET1K_V1, folder)
        )

    def _logits(self, images: Tensor) -> Tensor:
        resized = nn.functional.interpolate(
            images.float(), size=(224, 224), mode="bilinear", antialias=True
        )
        return self.network(self.normalize(resized))

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Scalar distance of images (B, 3, H, W) in [0, 1]; gradient through the reconstruction only."""
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                target = self._logits(images)
            return nn.functional.mse_loss(self._logits(reconstruction), target)


class PerceptualMix(nn.Module):
    """Weighted mean of perceptual distances, as TiTok parametrises it.

    With weights (1.0, 0.1) and a `perceptual_weight` of 1.1 the loss is `1.0 * first + 0.1 * second`.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.networks, self.weights = nn.ModuleList(networks), tuple(weights)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Scalar distance of images (B, 3, H, W) in [0, 1]; gradient through the reconstruction only."""
        pairs = zip(self.weights, self.networks, strict=True)
        return torch.stack(
            [weight * network(reconstruction, images) for weight, network in pairs]
        ).sum() / sum(self.weights)


PRETRAINED: dict[str, type[LPIPS | ConvNeXtLogits]] = {"lpips": LPIPS, "convnext_s": ConvNeXtLogits}


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
        teacher, normalize: what `encoder` compares features with: the frozen original encoder and its input normalisation.
        folder: with the pretrained weights; None: torch's cache, or a download into it.
        random: leave the weights random instead, so that the distance means nothing.

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
            network = PRETRAINED[part]()
            if not random:
                network.load_pretrained(folder)
            networks.append(network)
        else:
            raise ValueError(
                f"unknown perceptual network {part!r}. {did_you_mean(part, ['encoder', *PRETRAINED])}"
            )
    loss = PerceptualMix(networks, mix) if len(networks) > 1 else networks[0]
    return loss.eval().requires_grad_(False)


def pretrained_weights(weights: WeightsEnum, folder: str | None) -> dict[str, Tensor]:
    """The state dict of torchvision `weights`, from `folder` or else from torch's cache, downloaded when absent.

    Raises:
        FileNotFoundError: when they are neither there nor within reach.
        ValueError: when the file is damaged.
    """
    file = (
        Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / weights.url.rpartition("/")[2]
    )
    try:
        if not folder and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                weights.url, str(file), hash_prefix=file.stem.rpartition("-")[2]
            )
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{weights} cannot be had ({error}): download {weights.url} and save it as {file}"
            + ("" if folder else ", or in any folder that perceptual_weights=FOLDER then names")
            + ". A dry run or a test, where the loss may mean nothing, can set random_perceptual_weights=true instead."
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): remove it and download {weights.url} again"
        ) from error
