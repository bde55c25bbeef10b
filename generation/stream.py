"""The training samples of the generator, as a pure function of (seed, position)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.code_shards import CodeDataset
from vqrae.generation.vocabulary import PromptEncoder, VisualVocabulary, pad_left

_DROPOUT_STREAM = 1  # a random stream of its own: dropping a caption never changes the order


class TrainingStream(Dataset):
    """Every sample that a training run sees, in order: epoch after epoch, each a seeded permutation of the pictures.

    Position i alone decides picture, wording and caption dropout, so that a resumed run, another number of processes or
    of loader workers sees the same samples. Read it in sequence.

    Args:
        length: samples of the whole run (steps x global batch size).
        caption_dropout: share of samples with the empty caption.
    """

    def __init__(self, codes: CodeDataset, length: int, *, caption_dropout: float, seed: int = 0) -> None:
        self.codes, self.length, self.caption_dropout, self.seed = codes, length, caption_dropout, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        """{"codes": int64 (N,), "caption": str}"""
        epoch, place = divmod(position, len(self.codes))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.codes))
        sample = self.codes.sample(int(self._order[place]), draw=epoch)
        if np.random.default_rng([self.seed, position, _DROPOUT_STREAM]).random() < self.caption_dropout:
            sample["caption"] = ""
        return sample


class GenerationCollator:
    """Samples -> a left-padded causal-LM batch whose last N tokens are the codes, and whose loss is on these only.

    Returns:
        input_ids, attention_mask, position_ids, labels, each int64 (B, T + N); labels are IGNORE_INDEX elsewhere.
    """

    def __init__(self, encode_prompt: PromptEncoder, vocabulary: VisualVocabulary) -> None:
        self.encode_prompt, self.vocabulary = encode_prompt, vocabulary

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [self.encode_prompt(sample["caption"]) for sample in samples]
        prompt_ids = torch.tensor(pad_left(prompts, 0))
        prompt_mask = torch.tensor(pad_left([[1] * len(prompt) for prompt in prompts], 0))
        code_ids = self.vocabulary.to_ids(torch.stack([sample["codes"] for sample in samples]))
        attention_mask = torch.cat([prompt_mask, torch.ones_like(code_ids)], dim=1)
        return {
            "input_ids": torch.cat([prompt_ids, code_ids], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
            "labels": torch.cat([torch.full_like(prompt_ids, IGNORE_INDEX), code_ids], dim=1),
        }
