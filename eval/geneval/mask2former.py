"""Mask2Former (arXiv 2112.01527) on COCO as GenEval's detector, in plain transformers.

`from_mmdet` takes GenEval's own checkpoint, so that its scores are GenEval's; `from_transformers`
takes a Hugging Face checkpoint, another training run whose scores carry another name. Pre- and
post-processing are mmdetection's: the Hugging Face processor drops overlaps and resizes masks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from vqrae.common.checkpoints import load_model, model_fingerprint, resolve_model
from vqrae.eval.geneval.mmdet_keys import from_mmdet
from vqrae.eval.geneval.prompts import OBJECT_NAMES
from vqrae.eval.geneval.rules import Box, Detection
from vqrae.eval.reconstruction.networks import find_weights

MMDET_CONFIG = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
MMDET_FILE = f"{MMDET_CONFIG}_20220504_001756-743b7d99.pth"
MMDET_URL = (
    f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{MMDET_CONFIG}/{MMDET_FILE}"
)
HUGGING_FACE = "facebook/mask2former-swin-small-coco-instance"

# The test pipeline of mmdetection's configuration.
SHORT_SIDE, LONG_SIDE = 800, 1333
DIVISOR = 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MMDET_PADDING = 128  # grey level, before normalising; detectron2 trained Hugging Face's with zeros
MAX_PER_IMAGE = 100

# Of scalars that training hooks may leave in a checkpoint's metadata: harmless, but not allowed by
# default.
_NUMPY_SCALARS: list[Any] = [
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),  # its name before numpy 2
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64", "bool")),
]


def swin_small_config() -> Mask2FormerConfig:
    """The architecture of GenEval's detector: Swin-S, 100 queries, 80 classes, 68.7 M weights."""
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=backbone, num_labels=len(OBJECT_NAMES))


class Mask2FormerDetector:
    """GenEval's object detector; `padding` is how it was trained to see a margin, see `prepare`."""

    threshold, counting_threshold = 0.3, 0.9  # GenEval's

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        name: str,
        identity: str,
        padding: int | None = None,
    ) -> None:
        self.model, self.padding = model.eval().requires_grad_(False), padding
        self.name, self.identity = name, identity

    @classmethod
    def from_mmdet(cls, weights: str | None = None, device: str = "cpu") -> "Mask2FormerDetector":
        """With GenEval's checkpoint: the file `weights`, or torch's cache, see `find_weights`."""
        path = find_weights(MMDET_FILE, MMDET_URL, "weights", weights)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            stored = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
        model = Mask2FormerForUniversalSegmentation(swin_small_config())
        # Not strict for the sake of NOT_IN_MMDET alone: `from_mmdet` refuses everything else.
        model.load_state_dict(from_mmdet(stored, model.state_dict()), strict=False)
        return cls(model.to(device), "mask2former-swin-s(mmdet)", MMDET_FILE, MMDET_PADDING)

    @classmethod
    def from_transformers(
        cls, name: str = HUGGING_FACE, device: str = "cpu"
    ) -> "Mask2FormerDetector":
        """With the weights of a folder or hub id; ValueError if it is not for COCO's 80 things."""
        model = load_model(Mask2FormerForUniversalSegmentation, resolve_model(name))
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        # Names differ in places ("mouse", "couch"/"sofa"); these are far apart and spelt the same.
        anchors = {0: "person", 15: "cat", 22: "zebra", 46: "banana", 74: "clock", 79: "toothbrush"}
        is_coco = len(labels) == len(OBJECT_NAMES)
        if not is_coco or any(labels[i] != label for i, label in anchors.items()):
            raise ValueError(
                f"{name} has {len(labels)} classes {labels[:3]} …, expected COCO's 80 in its order"
            )
        title = f"mask2former-hf({Path(name).name})"
        return cls(model.to(device), title, model_fingerprint(name))

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Detection]:
        """The 100 best pairs of query and class, masks (H, W) bool at the image's size."""
        pixel_values, resized = prepare(image, self.padding)
        output = self.model(pixel_values=pixel_values.to(self.model.device))
        classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
        padded = (pixel_values.shape[-2], pixel_values.shape[-1])
        return instances(classes, masks, padded, resized, (image.height, image.width))


def prepare(image: Image.Image, padding: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """RGB image -> (1, 3, H, W) for the detector, and the (height, width) that the image covers.

    Resized to fit 800 x 1333 without antialiasing, like OpenCV, to whole grey levels; padded to
    multiples of 32 with the grey level `padding`, normalised like the image, or with zeros.
    """
    scale = min(LONG_SIDE / max(image.size), SHORT_SIDE / min(image.size))
    width, height = (int(side * scale + 0.5) for side in image.size)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False).round()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    padded = torch.zeros(1, 3, height + -height % DIVISOR, width + -width % DIVISOR)
    if padding is not None:
        padded += (padding - mean) / std
    padded[..., :height, :width] = (pixels - mean) / std
    return padded, (height, width)


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    size: tuple[int, int],
) -> list[Detection]:
    """mmdetection's instances: class probability times the mean probability inside the mask.

    class_logits are (queries, classes + 1), the last one for "nothing"; mask_logits (queries, h,
    w); padded, resized, size: (height, width) of the network's input, of the image in it, of the
    image.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    scores, places = probabilities.flatten().topk(min(MAX_PER_IMAGE, probabilities.numel()))
    queries, labels = places // num_classes, places % num_classes
    masks: dict[int, tuple[np.ndarray, float]] = {}
    # Query by query: all masks at the image's size would fill the memory.
    for query in queries.unique().tolist():
        logits = mask_logits[None, query : query + 1].float()
        logits = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
        logits = logits[..., : resized[0], : resized[1]]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0]
        inside = logits > 0
        certainty = float((logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        masks[query] = inside.cpu().numpy(), certainty
    found = []
    for score, query, label in zip(scores.tolist(), queries.tolist(), labels.tolist(), strict=True):
        mask, certainty = masks[query]
        found.append(Detection(OBJECT_NAMES[label], score * certainty, mask_box(mask), mask))
    return found


def mask_box(mask: np.ndarray) -> Box:
    """The smallest box around a mask, its far edges exclusive; all zeros around an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
