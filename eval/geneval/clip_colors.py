"""GenEval's colour test: CLIP ViT-L/14 of OpenAI decides which of ten colours the masked crop of an object has."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from vqrae.common.checkpoints import load_model, resolve_model
from vqrae.common.files import weights_fingerprint
from vqrae.eval.geneval.rules import COLORS, Detection

CLIP = "openai/clip-vit-large-patch14"
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """An object cut out along its box, grey where its mask is not."""
    if detection.mask is not None:
        if detection.mask.shape != (image.height, image.width):
            raise ValueError(
                f"got a mask of {detection.mask.shape} for an image of {image.size}, expected the same size"
            )
        image = Image.composite(
            image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(detection.mask)
        )
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return image.crop((left, top, right, bottom))


class ClipColorClassifier:
    """Zero-shot colours by CLIP.

    Args:
        identity: which weights these are.
    """

    def __init__(
        self, model: CLIPModel, text_tokenizer: PreTrainedTokenizerBase, name: str, identity: str
    ) -> None:
        self.model, self.text_tokenizer = model.eval().requires_grad_(False), text_tokenizer
        self.name, self.identity = name, identity
        side = model.config.vision_config.image_size
        resize = Resize(side, interpolation=InterpolationMode.BICUBIC)
        self._transform = Compose([resize, CenterCrop(side), ToTensor(), Normalize(MEAN, STD)])
        self._colors: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, name: str = CLIP, device: str = "cpu") -> "ClipColorClassifier":
        """Load a CLIP folder or hub id.

        Raises:
            ValueError: when its activation is not the quick GELU that OpenAI's weights were trained with.
        """
        folder = resolve_model(name)
        model = load_model(CLIPModel, folder)
        activation = model.config.vision_config.hidden_act
        if activation != "quick_gelu":
            raise ValueError(
                f"{name} runs with {activation}, expected quick_gelu: these are not OpenAI's weights as trained"
            )
        identity = weights_fingerprint(folder) if Path(folder).is_dir() else name
        return cls(
            model.to(device),
            AutoTokenizer.from_pretrained(folder),
            f"clip({Path(name).name})",
            identity,
        )

    @torch.inference_mode()
    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        """The most similar of the ten colours for each object."""
        pixel_values = torch.stack(
            [self._transform(crop_object(image, detection)) for detection in detections]
        )
        pooled = self.model.vision_model(
            pixel_values=pixel_values.to(self.model.device)
        ).pooler_output
        images = self.model.visual_projection(pooled)
        similarity = images / images.norm(dim=-1, keepdim=True) @ self._color_vectors(class_name).T
        return [COLORS[index] for index in similarity.argmax(-1).tolist()]

    def _color_vectors(self, class_name: str) -> Tensor:
        """One unit vector per colour (10, D): the mean over templates of unit vectors."""
        if class_name not in self._colors:
            texts = [
                template.format(color=color, name=class_name)
                for color in COLORS
                for template in TEMPLATES
            ]
            inputs = self.text_tokenizer(texts, padding=True, return_tensors="pt").to(
                self.model.device
            )
            pooled = self.model.text_model(**inputs).pooler_output
            vectors = self.model.text_projection(pooled)
            vectors = (
                (vectors / vectors.norm(dim=-1, keepdim=True))
                .view(len(COLORS), len(TEMPLATES), -1)
                .mean(1)
            )
            self._colors[class_name] = vectors / vectors.norm(dim=-1, keepdim=True)
        return self._colors[class_name]
