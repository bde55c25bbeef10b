"""A decoder of transformers run one position at a time, on static buffers of keys and values.

Shapes: R rows, S slots of the buffers, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vqrae.generation.lean_decoder import LeanDecoder, has_plain_layers
from vqrae.generation.modeling import pad_left


class CachedRows:
    """Sequences that grow together: every row has the same slots, short prompts are padded in
    front.

    Args:
        decoder: a `Qwen3Model`, `LlamaModel` …
        num_slots: vectors to come, prompts included.
        positions: number the slots; else all have position 0.
        compile: compile the forward pass, on CUDA into a graph without launch overhead. Shapes are
            then the same in every step: attention runs over the whole buffer, where it otherwise
            sees only what is filled.

    Raises:
        ValueError: when the model's attention takes no mask of ours.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        num_rows: int,
        num_slots: int,
        *,
        positions: bool = True,
        compile: bool = False,
    ) -> None:
        attention = decoder.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"attention is {attention!r}, expected sdpa or eager: reload the model"
            )
        self.decoder, self.run = decoder, decoder
        self.compile, self.positions = compile, positions
        if compile:
            self.run = torch.compile(decoder, mode="reduce-overhead")
        self.slots_S = torch.arange(num_slots, device=decoder.device)
        self.padding_R1 = torch.zeros(num_rows, 1, dtype=torch.int64, device=decoder.device)
        config = decoder.config
        head_dim = decoder.layers[0].self_attn.head_dim  # Qwen2 does not configure it
        self.cache = KeyValues(
            config.num_hidden_layers,
            (num_rows, config.num_key_value_heads, num_slots, head_dim),
            like=decoder.get_parameter("norm.weight"),
        )
        # Added to attention scores. The lowest number instead of -inf: rows of padding see nothing,
        # and would become NaN.
        self.blocked = torch.finfo(decoder.dtype).min
        self.mask_RS = torch.empty(num_rows, num_slots, dtype=decoder.dtype, device=decoder.device)
        self.lean: LeanDecoder | None = None
        if decoder.device.type == "cpu" and not compile and has_plain_layers(decoder):
            self.lean = LeanDecoder(decoder, self.cache.layers)
        self.restart()
        self._prepare_lean()

    def restart(self) -> None:
        """Forget everything that was fed."""
        self.filled = 0
        self.mask_RS.fill_(self.blocked)

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Begin each row with the ids of its prompt; equal prompts are computed once."""
        different = list(dict.fromkeys(prompts))
        length = self.filled = max(len(prompt) for prompt in prompts)
        device = self.slots_S.device
        chosen_R = torch.tensor([different.index(prompt) for prompt in prompts], device=device)
        padding = torch.tensor([length - len(p) for p in different], device=device)[:, None]
        # The first rows of the buffers hold the different prompts, which are copied to all.
        slots, mask = self.slots_S[:length], self.mask_RS[: len(different)]
        mask[:, :length].masked_fill_(slots >= padding, 0)
        if length > 0:
            causal = mask[:, None, None, :length].masked_fill(slots > slots[:, None], self.blocked)
            ids = torch.tensor(pad_left(different, 0), device=device)
            vectors = self.decoder.get_input_embeddings()(ids)
            self._forward(self.decoder, vectors, (slots - padding).clamp(min=0), causal, slots)
        for layer in self.cache.layers:
            layer[:, :, :, :length] = layer[:, chosen_R, :, :length]
        self.padding_R1, self.mask_RS = padding[chosen_R], mask[chosen_R]
        self._prepare_lean()

    def _prepare_lean(self) -> None:
        if self.lean is not None:
            positions_RS = (self.slots_S - self.padding_R1).clamp(min=0) * self.positions
            padded_RS = self.slots_S < self.padding_R1
            self.lean.prepare(positions_RS, padded_RS * self.blocked)

    def feed(self, vectors: Tensor) -> Tensor:
        """Final-normed states (R, D) of the next input vectors (R, D), which all later ones see."""
        if self.lean is not None:
            self.filled += 1
            return self.lean(vectors, self.filled - 1)
        slot = self.slots_S[self.filled : self.filled + 1]
        self.mask_RS[:, self.filled] = 0
        self.filled += 1
        mask = self.mask_RS if self.compile else self.mask_RS[:, : self.filled]
        positions = (slot - self.padding_R1) * self.positions
        return self._forward(self.run, vectors[:, None], positions, mask[:, None, None], slot)[:, 0]

    def _forward(
        self, run: Any, vectors: Tensor, positions: Tensor, mask: Tensor, slots: Tensor
    ) -> Tensor:
        self.cache.write_to(slots, rows=len(vectors), length=mask.shape[-1])
        output = run(
            inputs_embeds=vectors,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state


class KeyValues:
    """Keys and values of every layer, written in place; `update` is all that a layer calls.

    Args:
        shape: rows, heads, slots, width of a head.
        like: a tensor of the model, for type and device.
    """

    def __init__(self, num_layers: int, shape: tuple[int, ...], *, like: Tensor) -> None:
        self.layers = []
        for _ in range(num_layers):
            # Zeros: a masked slot has weight 0 in the sum over values, which NaN would survive.
            layer = torch.zeros((2, *shape), dtype=like.dtype, device=like.device)
            torch._dynamo.mark_static_address(layer, guard=False)  # for CUDA graphs without copies
            self.layers.append(layer)

    def write_to(self, slots: Tensor, *, rows: int, length: int) -> None:
        """Where the next pass writes, and how many rows and slots it reads."""
        self.slots = slots
        self.rows, self.length = rows, length

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        both = self.layers[layer][:, : self.rows]
        both[0].index_copy_(2, self.slots, keys)
        both[1].index_copy_(2, self.slots, values)
        return both[0, :, :, : self.length], both[1, :, :, : self.length]
