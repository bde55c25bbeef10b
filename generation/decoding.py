"""The forward passes of sampling: one buffer of keys and values, and the order in which codes are drawn.

Shapes: R rows (images, then as many without caption), Q tokens fed at once, S slots of the buffer, D width, N codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from vqrae.generation.vocabulary import pad_left


class _Buffer:
    """Keys and values of every layer, written in place; `update` is all that `Qwen3Model` asks of its cache."""

    def __init__(self, model: Qwen3ForCausalLM, num_rows: int, num_slots: int) -> None:
        config = model.config
        shape = (2, num_rows, config.num_key_value_heads, num_slots, config.head_dim)
        # Zeros: a slot that is masked still enters the sum over values, with weight 0, which NaN would survive.
        options = {"dtype": model.dtype, "device": model.device}
        self.layers = [torch.zeros(shape, **options) for _ in range(config.num_hidden_layers)]
        for layer in self.layers:
            torch._dynamo.mark_static_address(
                layer, guard=False
            )  # CUDA graphs write to it without copies
        self.rows, self.length, self.slots = slice(0), 0, torch.empty(0)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        both = self.layers[layer][:, self.rows]
        for buffer, new in zip(both, (keys, values), strict=True):
            buffer.index_copy_(2, self.slots, new)
        return both[0, :, :, : self.length], both[1, :, :, : self.length]


class CachedRows:
    """Sequences that grow side by side: every row has the same slots, short prompts are padded at the front.

    Args:
        prompts: ids of the different prompts, without the token that starts the image; computed once each.
        choice: which of the prompts each row begins with, (R,).
        num_codes: slots that follow the prompt.
        compile: compile the forward pass, on CUDA into a graph without launch overhead. The shapes then stay the same
            from step to step: attention runs over the whole buffer, where it otherwise sees only what is filled.

    Raises:
        ValueError: when the model's attention takes no mask of ours.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        prompts: Sequence[Sequence[int]],
        choice: Sequence[int],
        num_codes: int,
        *,
        compile: bool = False,
    ) -> None:
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attention is {model.config._attn_implementation!r}, expected sdpa or eager: reload the model"
            )
        self.prompt_length = max(len(prompt) for prompt in prompts)
        num_slots = self.prompt_length + num_codes
        self.model, self.compile = model, compile
        if compile:
            num_slots = -(-num_slots // 64) * 64  # prompts of like length share their compiled code
        self.forward = (
            torch.compile(model.model, mode="reduce-overhead") if compile else model.model
        )
        device = model.device
        self.padding = torch.tensor(
            [self.prompt_length - len(prompt) for prompt in prompts], device=device
        )
        self.all_slots = torch.arange(num_slots, device=device)
        self.buffer = _Buffer(model, len(choice), num_slots)
        # Added to attention scores. The lowest number, not -inf: rows of padding see nothing, and must not become NaN.
        self.masked = torch.finfo(model.dtype).min
        self.mask = torch.full(
            (len(choice), num_slots), self.masked, dtype=model.dtype, device=device
        )
        self._prefill(prompts, torch.tensor(choice, device=device))

    def _prefill(self, prompts: Sequence[Sequence[int]], choice: Tensor) -> None:
        rows, length = slice(len(prompts)), self.prompt_length
        seen = self.all_slots[:length] >= self.padding[:, None]
        self.mask[rows, :length] = self.mask[rows, :length].masked_fill(seen, 0)
        if length > 0:
            ids = torch.tensor(pad_left(prompts, 0), device=choice.device)
            self._forward(self.model.model, ids, self.all_slots[:length], length, rows)
        self.padding, self.mask = self.padding[choice], self.mask[choice]
        for layer in self.buffer.layers:
            layer[:, :, :, :length] = layer[:, choice, :, :length]

    def feed(
        self, ids: Tensor, places: Tensor, end: int, rows: slice, *, once: bool = False
    ) -> Tensor:
        """Hidden states (R, Q, D) of ids (R, Q) in some of the rows; whatever is fed from now on sees them.

        Args:
            places: where the ids belong, (Q,), counted from the end of the prompt; a place that was fed before is replaced.
            end: one past the last place fed so far.
            once: this many ids will not come again, so that compiling the pass does not pay.
        """
        slots = self.prompt_length + places
        self.mask[rows].index_fill_(1, slots, 0)
        length = len(self.all_slots) if self.compile else self.prompt_length + end
        return self._forward(self.model.model if once else self.forward, ids, slots, length, rows)

    def _forward(
        self, forward: Callable[..., Any], ids: Tensor, slots: Tensor, length: int, rows: slice
    ) -> Tensor:
        self.buffer.rows, self.buffer.slots, self.buffer.length = rows, slots, length
        later = self.all_slots[:length] > slots[:, None]
        mask = self.mask[rows, None, None, :length].masked_fill(later, self.masked)
        output = forward(
            input_ids=ids,
            attention_mask={"full_attention": mask},  # transformers would make it anew from scratch
            position_ids=(slots - self.padding[rows, None]).clamp(min=0),
            past_key_values=self.buffer,
            use_cache=True,
        )
        return output.last_hidden_state


@dataclass(frozen=True)
class Step:
    """One forward pass. Place p holds the code before code p: place 0 is BOI, and what is fed at place p predicts code p."""

    drawn: list[int]
    """Places fed whose codes are drawn, ascending."""
    corrected: list[int]
    """Places fed again, now with the code that was not known when the row behind them began."""
    borrowed: tuple[int, int] | None
    """(place, other): the place whose code is not known yet begins with the code of another."""


def decoding_steps(num_codes: int, window: int = 0) -> list[Step]:
    """The forward passes of one image: N, or fewer where rows are drawn side by side.

    With a window, a row begins as soon as the one above it is `window` codes ahead (ZipAR, He et al. 2024, with raster
    positions kept): a grid of H rows and W columns takes W + (H - 1) window passes. A row that begins before the one above
    has ended stands on that row's newest code in place of its last; once drawn, the last takes its place for all that
    follow. From window = W on this is the plain order.

    Raises:
        ValueError: when a window is asked of codes that form no square.
    """
    columns = math.isqrt(num_codes) if window else num_codes
    if num_codes % columns or (window and columns**2 != num_codes):
        raise ValueError(
            f"got window {window} for {num_codes} codes, which form no square grid: set window=0"
        )
    rows, window = num_codes // columns, min(window, columns) or columns
    steps = []
    for step in range(columns + (rows - 1) * window):
        column = {row: step - row * window for row in range(rows)}
        drawn = [row * columns + column[row] for row in range(rows) if 0 <= column[row] < columns]
        ended = [
            (row + 1) * columns
            for row in range(rows - 1)
            if column[row] == columns and window < columns
        ]
        begun = [row for row in range(1, rows) if column[row] == 0]
        borrowed = [(row * columns, (row - 1) * columns + window) for row in begun]
        steps.append(Step(drawn, ended, borrowed[0] if borrowed else None))
    return steps
