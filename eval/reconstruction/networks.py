"""Networks that score images. Without their weights a metric is "not measured", never random.

inception   torch-fidelity's Inception-v3, which defines rFID and the Inception score
encoder     the tokenizer's own original encoder; gives `frechet_encoder`
lpips       LPIPS on VGG16 or AlexNet
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrae.common.checkpoints import model_fingerprint, resolve_model
from vqrae.common.files import sha256
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.perceptual import LPIPS

# Files in torch's cache, and where they come from. Names end in the first digits of the SHA-256.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
Backbone = Literal["vgg", "alex"]
LPIPS_FILES: dict[Backbone, str] = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
LPIPS_URL = "https://download.pytorch.org/models"

Distance = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, images), both (B, 3, H, W) in [0, 1] -> (B,)."""


class NotMeasured(Exception):
    """A metric cannot be taken; the text says why and what would change that."""


def find_weights(name: str, url: str, key: str, path: str | None = None) -> Path:
    """The weights file `name`, at `path` or in torch's cache, with the content that it promises.

    Raises NotMeasured when no path is given and the cache has no such file, with the `url` to get
    it from and the argument `key` that names another place; ValueError when the path leads nowhere,
    or the file is not what its name promises.
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
            f"{found} is not {name}: its SHA-256 starts with {digest[:8]}, expected {promised}. "
            f"Get {url} again"
        )
    return found


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow graph.

    Images (B, 3, H, W) at k/255 -> features (B, 2048), logits (B, 1008). Logits are those without
    the bias, as the Inception score has always been taken.
    """

    name, identity = "inception", INCEPTION_FILE
    width, num_classes = 2048, 1008

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise NotMeasured(
                "the package torch-fidelity is missing: pip install torch-fidelity"
            ) from None
        path = find_weights(INCEPTION_FILE, INCEPTION_URL, "inception_weights", weights)
        # The class below unpickles anything; a file that passes here holds tensors only.
        torch.load(path, weights_only=True)
        self.network = FeatureExtractorInceptionV3(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network((images * 255).round().to(torch.uint8))


class OriginalEncoder(nn.Module):
    """Mean over tokens of a tokenizer's features: images (B, 3, H, W) in [0, 1] -> (B, D), None.

    The tokenizer started from this encoder and was distilled to it, so the distance is not an
    independent judgement. Its weights are its identity.
    """

    name, num_classes = "encoder", 0

    def __init__(self, tokenizer: VQRAEModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.width = tokenizer.config.feature_dim
        self.identity = model_fingerprint(tokenizer.name_or_path)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        size = self.tokenizer.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return self.tokenizer.encode_features(images).float().mean(1), None


def original_tokenizer(run: str, given: str | None = None) -> VQRAEModel:
    """The tokenizer with its original encoder: stage 1 of a run, which freezes it, or `given`.

    Raises NotMeasured when none is given and `run` is not a run directory with a finished stage 1.
    """
    if given is not None:
        return VQRAEModel.from_pretrained(resolve_model(given))
    folder = Path(run) / "stage1" / "model"
    if not folder.is_dir():
        raise NotMeasured(
            f"{folder}, which has the encoder from before the training, does not exist: "
            "give original_encoder="
        )
    return VQRAEModel.from_pretrained(folder)


def build_lpips(backbone: Backbone, weights: str | None, device: str) -> Distance:
    """LPIPS on one backbone, per image; NotMeasured when the backbone's weights are not there."""
    name = LPIPS_FILES[backbone]
    path = find_weights(name, f"{LPIPS_URL}/{name}", f"{backbone}_weights", weights)
    network = LPIPS(backbone)
    network.load_backbone(torch.load(path, weights_only=True))
    return network.to(device).eval().requires_grad_(False).per_image
