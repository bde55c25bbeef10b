"""Images -> codes with a frozen tokenizer: ahead of training (`extract_codes`) or while it runs."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vqrae.tokenizer.modeling import VQRAEModel


def load_encoder(folder: Path) -> VQRAEModel:
    """The tokenizer in fp32, frozen; its decoder is left out, which halves the memory.

    Raises:
        ValueError: when weights are missing or not finite.
    """
    model = VQRAEModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.decoder = nn.Identity()
    return model


@torch.no_grad()
def encode_images(model: VQRAEModel, images: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) -> codes int64 (B, N), on the model's device.

    In fp32 whatever surrounds the call: under bf16 near neighbours in the codebook change places (docs/generation.md has the
    share), and codes made ahead would not be those made while training.

    Raises:
        ValueError: for a tokenizer with several codebooks.
    """
    images = images.to(model.device, non_blocking=True)
    with torch.autocast(images.device.type, enabled=False):
        codes = model.encode(
            images.float() / 255, check=False
        )  # of 8-bit values; training must not wait
    if codes.ndim != 2:
        raise ValueError(
            f"got codes of shape {tuple(codes.shape)}, expected (B, N): set a tokenizer with one codebook"
        )
    return codes
