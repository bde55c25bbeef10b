"""A decoder of transformers, one position at a time on a CPU, with few operations.

transformers' forward pass costs a small model more in calls than in products, and a large one reads
its weights slowly, see `product`. This is the same arithmetic for layers of the Llama kind.

Shapes: R rows, S slots, D width, H heads, K heads of keys and values, d their width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from vqrae.common.lean import root_mean_square_norm

LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
Linear = tuple[Tensor, Tensor | None]  # weight and bias


def has_plain_layers(decoder: PreTrainedModel) -> bool:
    """Whether `LeanDecoder` computes what the decoder does: no other kind, adapter or partition."""
    for layer in decoder.layers:
        if type(layer) not in LAYERS:
            return False
        for part in linear_layers(layer):
            if type(part) is not nn.Linear or part.weight.ndim != 2:
                return False
    return True


def linear_layers(layer: Any) -> list[nn.Linear]:
    """Of queries, keys, values and output; of gate, up and down."""
    attention, mlp = layer.self_attn, layer.mlp
    found = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*found, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class Layer(NamedTuple):
    """What a pass needs of a layer: attributes of modules are slow to look up."""

    linear: list[Linear]
    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    """Of queries and keys, in Qwen3."""
    scaling: float
    activation: Callable[[Tensor], Tensor]
    cache: Tensor
    """Keys and values (2, R K, S, d)."""


class LeanDecoder:
    """Final-normed states of one position after the other.

    Args:
        decoder: one that `has_plain_layers`.
        caches: keys and values (2, R, K, S, d) of each layer, written in place.
    """

    def __init__(self, decoder: PreTrainedModel, caches: Sequence[Tensor]) -> None:
        self.rotary, self.norm = decoder.rotary_emb, decoder.norm.weight
        self.epsilon = decoder.config.rms_norm_eps
        self.head_dim = decoder.layers[0].self_attn.head_dim
        self.key_heads = caches[0].shape[2]
        self.layers = []
        for layer, cache in zip(decoder.layers, caches, strict=True):
            attention, head_norms = layer.self_attn, None
            if isinstance(layer, Qwen3DecoderLayer):
                head_norms = (attention.q_norm.weight, attention.k_norm.weight)
            self.layers.append(
                Layer(
                    linear=[(part.weight, part.bias) for part in linear_layers(layer)],
                    norms=(layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
                    head_norms=head_norms,
                    scaling=attention.scaling,
                    activation=layer.mlp.act_fn,
                    cache=cache.flatten(1, 2),
                )
            )

    def prepare(self, positions: Tensor, mask: Tensor) -> None:
        """What later passes look up by slot.

        Args:
            positions: (R, S).
            mask: (R, S), added to attention scores.
        """
        self.cosines_RSd, sines_RSd = self.rotary(self.norm, positions)
        # x cos + rotate_half(x) sin: the sign moves from a half of x to a half of the sine.
        first, second = sines_RSd.chunk(2, dim=-1)
        self.sines_RSd = torch.cat([-first, second], dim=-1)
        mask = mask.to(self.norm.dtype)
        self.mask = mask.repeat_interleave(self.key_heads, dim=0)[:, None]

    def __call__(self, states: Tensor, slot: int) -> Tensor:
        """States (R, D) of input vectors (R, D), which see the slots up to theirs."""
        self.cos, self.sin = self.cosines_RSd[:, slot, None], self.sines_RSd[:, slot, None]
        for layer in self.layers:
            states = states + self.attend(layer, self.normed(states, layer.norms[0]), slot)
            hidden = self.normed(states, layer.norms[1])
            *_, gate, up, down = layer.linear
            gated = layer.activation(product(gate, hidden)) * product(up, hidden)
            states = states + product(down, gated)
        return self.normed(states, self.norm)

    def attend(self, layer: Layer, states: Tensor, slot: int) -> Tensor:
        """Attention of states (R, D), whose keys and values are written first."""
        queries, keys, values, output, *_ = layer.linear
        query = product(queries, states).view(len(states), -1, self.head_dim)
        key = product(keys, states).view(len(states), -1, self.head_dim)
        if layer.head_norms is not None:
            query = self.normed(query, layer.head_norms[0])
            key = self.normed(key, layer.head_norms[1])
        both_2BSd = layer.cache[:, :, : slot + 1]  # B: rows and heads of keys together
        both_2BSd[0, :, -1] = self.turned(key).flatten(0, 1)
        both_2BSd[1, :, -1] = product(values, states).view(-1, self.head_dim)
        query_BGd = self.turned(query).view(both_2BSd.shape[1], -1, self.head_dim)
        mask = self.mask[..., : slot + 1]
        scores = torch.baddbmm(mask, query_BGd, both_2BSd[0].mT, alpha=layer.scaling)
        attended = torch.bmm(scores.softmax(-1), both_2BSd[1])
        return product(output, attended.view(len(states), -1))

    def normed(self, states: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of the last dimension."""
        return weight * root_mean_square_norm(states, self.epsilon)[0]

    def turned(self, heads: Tensor) -> Tensor:
        """Rotary positions of heads (R, …, d)."""
        halves = heads.roll(self.head_dim // 2, -1)
        return torch.addcmul(heads * self.cos, halves, self.sin)


def product(linear: Linear, states: Tensor) -> Tensor:
    """A linear layer of few states (R, D), with its weight as the left operand.

    As the right one the library would copy it into the order that its kernels read, in every call.
    """
    weight, bias = linear
    output = torch.mm(weight, states.t()).t().contiguous()
    return output if bias is None else output + bias
