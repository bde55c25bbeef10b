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
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaProcessor

from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.conversations import normalize_turns
from vqrae.understanding.conversation import (
    IMAGE_TOKEN,
    ConversationCollator,
    as_sample,
    images_of,
    pad,
    tokenize,
)


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
            parts = [samples[i].get("position_ids", torch.arange(lengths[i])) for i in row]
            padding = width - sum(lengths[i] for i in row)  # is one more sample
            positions.append(torch.cat([*parts, torch.arange(padding)]))
        return {
            **batch,
            "position_ids": torch.stack(positions),
            "pixel_values": torch.cat(images),
            "use_cache": False,  # with a cache, samples would see their neighbours
        }


# ---- questions that do not see each other


def encode_turns(
    record: dict[str, Any],
    processor: LlavaProcessor,
    *,
    max_length: int = 2048,
    chat_template: str | None = None,
) -> dict[str, Tensor]:
    """Encode one record so that each question is asked alone, right after the images.

    Returns:
        What `encode_conversation` returns, and position_ids (T,), which return to the end of the
        images with every question.

    Raises:
        ValueError: as `encode_conversation` does, and for images after the first question.
    """
    images = images_of(record)
    turns = normalize_turns(record["conversations"], num_images=len(images))
    head = f"{IMAGE_TOKEN}\n" * len(images)
    if images and not turns[0]["value"].startswith(head):
        raise ValueError(f"record {record.get('id')!r} has images after its first question")
    shared = 0  # tokens up to the end of the images
    parts = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text = question["value"].removeprefix(head)
        asked = [{"from": "human", "value": head + text}, answer]
        input_ids, trained = tokenize({**record, "conversations": asked}, processor, chat_template)
        parts.append((input_ids[shared:], trained[shared:], torch.arange(shared, len(input_ids))))
        if not shared and images:
            shared = int((input_ids == processor.image_token_id).nonzero().max()) + 1
    input_ids, trained, positions = map(torch.cat, zip(*parts, strict=True))
    sample = as_sample(input_ids, trained, record, processor, max_length)
    return {**sample, "position_ids": positions[:max_length]}


def visible(position_ids: Tensor) -> Tensor:
    """Which tokens each token sees, from (R, T) positions: bool (R, T, T).

    A token sees those before it in its sample, which begins at position 0. Where positions return
    to a lower one, what stands between is not seen from there on.
    """
    before = F.pad(position_ids[:, :-1], (1, 0), value=-1)
    returns = position_ids <= before
    samples, turns = (position_ids == 0).cumsum(1), returns.cumsum(1)
    first = torch.where(returns, torch.arange(position_ids.shape[1]), 0).cummax(1).values
    start = position_ids.gather(1, first)  # position where the turn of each token begins
    same_turn = turns[:, :, None] == turns[:, None, :]
    shared = position_ids[:, None, :] < start[:, :, None]
    same_sample = samples[:, :, None] == samples[:, None, :]
    return (same_sample & (same_turn | shared)).tril()


class SeparateCollator(PackingCollator):
    """Packed rows in which no question sees another one, nor its answer.

    Answers cannot be inferred from earlier ones, and every question has the form of a first one.
    """

    encode = staticmethod(encode_turns)

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        """What `PackingCollator` makes, and attention_mask (R, 1, T, T), added to the scores."""
        batch = super().collate(samples)
        hidden = ~visible(batch["position_ids"])[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        return {**batch, "attention_mask": mask}
