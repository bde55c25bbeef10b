"""A training batch as text for people: every sample with its trained tokens marked."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlavaProcessor

from vqrae.common.files import printable
from vqrae.common.trainer import IGNORE_INDEX

GREEN, GREY, RESET = "\033[1;32m", "\033[2m", "\033[0m"


def samples_of(batch: dict[str, Any]) -> Iterator[tuple[int, slice]]:
    """(row, columns) of every sample of a padded or packed batch, without padding."""
    for row in range(len(batch["input_ids"])):
        if "attention_mask" in batch:
            yield row, slice(0, int(batch["attention_mask"][row].sum()))
            continue
        starts = torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist()
        for start, end in itertools.pairwise([*starts, len(batch["input_ids"][row])]):
            if (
                batch["labels"][row, start:end] != IGNORE_INDEX
            ).any():  # else padding, or a blank image
                yield row, slice(start, end)


def describe_batch(batch: dict[str, Any], processor: LlavaProcessor, *, color: bool = True) -> str:
    """The samples of a batch, then what it consists of.

    Args:
        color: trained tokens in green and images in grey; else trained tokens stand in `[[ ]]`.
    """
    marks = {True: (GREEN, RESET), False: ("[[", "]]")}[color]
    lines = []
    tokens = 0
    for row, columns in samples_of(batch):
        ids, labels = batch["input_ids"][row, columns], batch["labels"][row, columns]
        trained = labels != IGNORE_INDEX
        tokens += len(ids)
        lines.append(
            f"--- row {row}, tokens {columns.start} to {columns.stop - 1}: {int(trained.sum())} of {len(ids)} trained"
        )
        lines.append("".join(_spans(ids.tolist(), trained.tolist(), processor, marks, color)))
    cells, images = batch["input_ids"].numel(), len(batch["pixel_values"])
    trained = int((batch["labels"] != IGNORE_INDEX).sum())
    shape = " x ".join(map(str, batch["input_ids"].shape))
    lines.append(
        f"=== {shape} = {cells} places, {tokens} tokens ({tokens / cells:.0%}), {trained} trained, {images} images"
    )
    return "\n".join(lines)


def _spans(
    ids: list[int],
    trained: list[bool],
    processor: LlavaProcessor,
    marks: tuple[str, str],
    color: bool,
) -> Iterator[str]:
    """Text of consecutive tokens of one kind; an image's tokens as one."""
    kinds = [
        "image" if i == processor.image_token_id else "trained" if t else ""
        for i, t in zip(ids, trained, strict=True)
    ]
    for kind, group in itertools.groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        span = [i for _, i in group]
        if kind == "image":
            text = f"<image x {len(span)}>"
            yield f"{GREY}{text}{RESET}" if color else text
        else:
            text = printable(processor.tokenizer.decode(span))
            yield f"{marks[0]}{text}{marks[1]}" if kind else text
