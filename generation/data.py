"""The training samples of the generator, and the frozen tokenizer that encodes their images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from vqrae.data.stream import draw_at
from vqrae.generation.modeling import Prompts, pad_left
from vqrae.tokenizer.modeling import VQRAEModel

_DROPOUT_STREAM = 1  # a separate random stream: dropping a caption never changes the order


class TrainingStream(Dataset):
    """Every sample of a training run, in order: epoch after epoch, each a seeded permutation.

    Position alone decides image, wording and caption dropout, so that a resumed run, another number
    of processes or of loader workers sees the same samples.

    Args:
        samples: code shards, captioned images or a mixture, with a length.
        length: samples of the whole run (steps x global batch size).
        caption_dropout: share of samples with the empty caption.
    """

    def __init__(self, samples: Any, length: int, *, caption_dropout: float, seed: int = 0) -> None:
        self.samples, self.length = samples, length
        self.caption_dropout, self.seed = caption_dropout, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        """{"codes": int64 (N,), or (N, n)} or {"image": uint8 (3, H, W)}, and "caption": str"""
        sample = self.samples[draw_at(self.samples, position, self.seed)]
        rng = np.random.default_rng([self.seed, position, _DROPOUT_STREAM])
        return {**sample, "caption": ""} if rng.random() < self.caption_dropout else sample


class GenerationCollator:
    """Samples -> prompts, padded in front, and the codes that follow them, which alone carry loss.

    Returns:
        input_ids: int64 (B, T), the prompts. attention_mask, position_ids: int64 (B, T + N), of
        prompt and image. codes: int64 (B, N), or (B, N, n). With images among the samples also
        `images`, uint8 (M, 3, H, W), and `image_rows`, int64 (M,), the rows whose codes
        `fill_codes` has yet to fill in.
    """

    def __init__(self, encode_prompt: Prompts) -> None:
        self.encode_prompt = encode_prompt
        self.to_come = torch.zeros(encode_prompt.vocabulary.code_shape, dtype=torch.int64)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [self.encode_prompt(sample["caption"]) for sample in samples]
        prompt_mask = torch.tensor(pad_left([[1] * len(prompt) for prompt in prompts], 0))
        codes = torch.stack([sample.get("codes", self.to_come) for sample in samples])
        attention_mask = F.pad(prompt_mask, (0, codes.shape[1]), value=1)
        batch = {
            "input_ids": torch.tensor(pad_left(prompts, 0)),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
            "codes": codes,
        }
        images = [row for row, sample in enumerate(samples) if "codes" not in sample]
        if images:
            batch["images"] = torch.stack([samples[row]["image"] for row in images])
            batch["image_rows"] = torch.tensor(images)
        return batch


def fill_codes(batch: dict[str, Tensor], encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A batch of a collator in which images, if any, have become codes.

    Args:
        encode: images uint8 (M, 3, H, W) -> codes int64 (M, N), or (M, N, n).
    """
    if "images" not in batch:
        return batch
    batch = dict(batch)
    rows, codes = batch.pop("image_rows"), encode(batch.pop("images"))
    batch["codes"] = batch["codes"].index_copy(0, rows, codes)
    return batch


def load_frozen_tokenizer(folder: Path) -> VQRAEModel:
    """The tokenizer in fp32, frozen; without its decoder, which halves the memory."""
    model = VQRAEModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.decoder = nn.Identity()
    return model


@torch.no_grad()
def encode_images(model: VQRAEModel, images: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) -> codes int64, on the model's device."""
    images = images.to(model.device, non_blocking=True)
    # fp32 even inside autocast: under bf16 near neighbours in the codebook change places, and codes
    # made ahead would not be those made while training (docs/generation.md).
    with torch.autocast(images.device.type, enabled=False):
        # 8-bit values are in range; checking them would make the host wait.
        return model.encode(images.float() / 255, check=False)
