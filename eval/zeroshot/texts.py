"""What puts images and texts into one space: a tokenizer's own text side, or its encoder's SigLIP.

Shapes: B images or texts, N visual tokens, D feature width, P width of the common space.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SiglipModel, SiglipVisionModel

from vqrae.common.checkpoints import load_model, require_kind, resolve_model
from vqrae.common.config import read_yaml
from vqrae.tokenizer.encoders import final_norm
from vqrae.tokenizer.modeling import VQRAEModel

BATCH = 256  # texts of one pass


class TextSide(Protocol):
    """The two ways into the common space; what comes out has length 1."""

    text_tokenizer: PreTrainedTokenizerBase

    def embed_images(self, features: Tensor) -> Tensor:
        """Features (B, N, D), continuous or quantized -> (B, P)."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, P)."""


class OwnTextSide:
    """The text side that a tokenizer was trained with (UniTok)."""

    def __init__(self, model: VQRAEModel, folder: str) -> None:
        self.model = model
        self.text_tokenizer = AutoTokenizer.from_pretrained(folder)

    def embed_images(self, features: Tensor) -> Tensor:
        return self.model.image_embeddings(features).float()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        encoded = self.text_tokenizer(list(texts), **options).to(self.model.device)
        names = ("input_ids", "attention_mask")
        return self.model.text_embeddings(**{name: encoded[name] for name in names}).float()


class SiglipTextSide:
    """That of the SigLIP whose vision tower a tokenizer started from, with its pooling head.

    Raises:
        ValueError: when the tower is not that of the tokenizer's encoder.
    """

    def __init__(self, model: VQRAEModel, name: str) -> None:
        folder = resolve_model(name)
        require_kind(folder, ("siglip",), "a SigLIP of images and texts")
        self.model = model
        self.siglip: SiglipModel = load_model(SiglipModel, folder).to(model.device).eval()
        self.text_tokenizer = AutoTokenizer.from_pretrained(folder)
        width = self.siglip.config.vision_config.hidden_size
        if not (isinstance(model.encoder, SiglipVisionModel) and width == model.config.feature_dim):
            raise ValueError(
                f"text_model={name}: got features of width {width}, expected those of the "
                f"tokenizer's {model.encoder.config.model_type}, {model.config.feature_dim} wide"
            )

    def embed_images(self, features: Tensor) -> Tensor:
        if self.model.config.feature_tap == "hidden_states[-1]":
            features = final_norm(self.model.encoder)(features)
        return F.normalize(self.siglip.vision_model.head(features).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        # SigLIP attends padding: it was trained with texts of full length.
        length = self.siglip.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        encoded = self.text_tokenizer(list(texts), return_tensors="pt", **options)
        input_ids = encoded["input_ids"].to(self.model.device)
        output = self.siglip.get_text_features(input_ids=input_ids)
        return F.normalize(output.pooler_output.float(), dim=-1)


def open_text_side(model: VQRAEModel, folder: str, text_model: str | None) -> TextSide:
    """The text side of a tokenizer.

    Args:
        folder: of the tokenizer.
        text_model: SigLIP of its encoder; None: the tokenizer's own.

    Raises:
        ValueError: when there is none.
    """
    if text_model is not None:
        return SiglipTextSide(model, text_model)
    if model.config.text_config is None:
        raise ValueError(
            f"{folder} has no text side: it was trained without texts (model.text_config), and its "
            "run names no encoder that came with one; give text_model=, the SigLIP of its encoder"
        )
    return OwnTextSide(model, folder)


def encoder_siglip(run: Path) -> str | None:
    """The SigLIP whose vision tower a run's encoder was, if its configuration names it."""
    file = run / "config.yaml"
    encoder = read_yaml(file).get("model", {}).get("encoder") if file.is_file() else None
    if encoder is None:
        return None
    # Our pretraining keeps the whole next to the tower; a released checkpoint is the whole.
    whole = Path(encoder) / "siglip"
    if whole.is_dir():
        return str(whole)
    return None if Path(encoder).is_dir() else encoder


@torch.inference_mode()
def embed_all(side: TextSide, texts: Sequence[str]) -> Tensor:
    """Texts, as many as there are -> (texts, P)."""
    parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    return torch.cat([side.embed_texts(part) for part in parts])
