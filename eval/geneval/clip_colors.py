"""GenEval's colour test: OpenAI's CLIP ViT-L/14 names the colour of an object's masked crop."""

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
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vqrae.common.checkpoints import load_model, model_fingerprint, resolve_model
from vqrae.eval.geneval.rules import COLORS, Detection

CLIP = "openai/clip-vit-large-patch14"
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """An object cut out along its box, grey where its mask is not."""
    if (mask := detection.mask) is not None:
        grey = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, grey, Image.fromarray(mask))
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return image.crop((left, top, right, bottom))


class ClipColorClassifier:
    """Zero-shot colours by CLIP; `identity` says which weights."""

    def __init__(
        self, model: CLIPModel, text_tokenizer: PreTrainedTokenizerBase, name: str, identity: str
    ) -> None:
        self.model, self.text_tokenizer = model.eval().requires_grad_(False), text_tokenizer
        self.name, self.identity = name, identity
        side = model.config.vision_config.image_size
        resize = Resize(side, interpolation=InterpolationMode.BICUBIC)
        normalize = Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        self._transform = Compose([resize, CenterCrop(side), ToTensor(), normalize])
        self._colors: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, name: str = CLIP, device: str = "cpu") -> "ClipColorClassifier":
        """Load a CLIP folder or hub id; ValueError without OpenAI's quick GELU."""
        folder = resolve_model(name)
        model = load_model(CLIPModel, folder)
        activation = model.config.vision_config.hidden_act
        if activation != "quick_gelu":
            raise ValueError(
                f"{name} has activation {activation}, expected quick_gelu as OpenAI's weights need"
            )
        text_tokenizer = AutoTokenizer.from_pretrained(folder)
        title = f"clip({Path(name).name})"
        return cls(model.to(device), text_tokenizer, title, model_fingerprint(name))

    @torch.inference_mode()
    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        """The most similar of the ten colours for each object."""
        crops = [self._transform(crop_object(image, detection)) for detection in detections]
        pixel_values = torch.stack(crops).to(self.model.device)
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        images = self.model.visual_projection(pooled)
        similarity = images / images.norm(dim=-1, keepdim=True) @ self._color_vectors(class_name).T
        return [COLORS[index] for index in similarity.argmax(-1).tolist()]

    def _color_vectors(self, class_name: str) -> Tensor:
        """One unit vector per colour (10, D): the mean over templates of unit vectors."""
        if class_name not in self._colors:
            texts: list[str] = []
            for color in COLORS:
                texts += [text.format(color=color, name=class_name) for text in TEMPLATES]
            inputs = self.text_tokenizer(texts, padding=True, return_tensors="pt")
            pooled = self.model.text_model(**inputs.to(self.model.device)).pooler_output
            vectors = self.model.text_projection(pooled)
            vectors = vectors / vectors.norm(dim=-1, keepdim=True)
            vectors = vectors.view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._colors[class_name] = vectors / vectors.norm(dim=-1, keepdim=True)
        return self._colors[class_name]
