"""Several conversations in one row instead of padding: faster, with the same loss.

Positions start again with every sample, and a sample sees nothing of its neighbours: without an
attention mask and without a cache, transformers reads the borders off `position_ids` and makes a
block-diagonal mask (eager, sdpa) or variable-length attention (flash-attention 2, where the batch
must be one row). Batches hold the same samples as without packing, so the global batch, the order
and a resume stay what they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqrae.common.trainer import IGNORE_INDEX
from vqrae.understanding.conversation import ConversationCollator, pad


def lay_out(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of samples in rows of up to twice the longest sample, with the least padding.

    Longer rows would save little more, and kernels without variable lengths compute their square.
    """
    longest = max(lengths)
    layouts = [first_fit(lengths, longest + longest * eighths // 8) for eighths in range(9)]

    def cells(rows: list[list[int]]) -> int:
        filled = [sum(map(lengths.__getitem__, row)) for row in rows]
        return len(rows) * max(filled)

    return min(layouts, key=cells)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens: longest samples first, each into the first that fits."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


class PackingCollator(ConversationCollator):
    """Turns records into rows of several samples for LLaVA.

    Args:
        one_row: all samples in a single row without padding, which flash-attention 2 needs. Other
            kernels would compute the whole square of such a row.
    """

    def __init__(self, *args: Any, one_row: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.one_row = one_row

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Batch of input_ids, labels, position_ids (R, T), pixel_values (P, 3, H, W), use_cache."""
        if not any("pixel_values" in sample for sample in samples):
            samples = [*samples, self.blank]
        lengths = [len(sample["input_ids"]) for sample in samples]
        rows = [list(range(len(samples)))] if self.one_row else lay_out(lengths)
        input_ids = []
        labels = []
        images = []
        for row in rows:
            targets = [samples[i]["labels"].clone() for i in row]
            for target in targets:
                target[0] = IGNORE_INDEX  # else the sample before would be trained to predict it
            labels.append(torch.cat(targets))
            input_ids.append(torch.cat([samples[i]["input_ids"] for i in row]))
            # Images in the order of their tokens.
            images += [samples[i]["pixel_values"] for i in row if "pixel_values" in samples[i]]
        batch = {
            "input_ids": pad(input_ids, self.processor.tokenizer.pad_token_id),
            "labels": pad(labels, IGNORE_INDEX),
        }
        width = batch["input_ids"].shape[1]
        positions = []
        for row in rows:
            ends = [lengths[i] for i in row]
            parts = [*ends, width - sum(ends)]  # padding is one more sample
            positions.append(torch.cat([torch.arange(length) for length in parts]))
        return {
            **batch,
            "position_ids": torch.stack(positions),
            "pixel_values": torch.cat(images),
            "use_cache": False,  # with a cache, samples would see their neighbours
        }
