"""Sampling codes with guidance, on static buffers of keys and values.

Equal prompts are computed once, guidance runs in the same forward pass, and only codes become
logits. Every image has its own seed: its N uniform numbers come first, and each code is read off
the inverse of its cumulative distribution. So an image does not depend on its batch (up to
rounding).

Shapes: B images, R rows (the images, then as many without caption), S slots of the buffers, D
width, K codes of the codebook, N codes of an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, Qwen3ForCausalLM

from vqrae.generation.modeling import VisualVocabulary, pad_left

GREEDY_BELOW = 1e-6  # of the temperature: logits divided by less overflow
LARGEST = 1e6  # of temperature and guidance scale: logits stay finite
SEEDS = range(-(2**63), 2**64)  # what torch's generators take


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are sampled from logits; filters apply in the order of transformers."""

    guidance_scale: float = 4.5
    """Classifier-free guidance u + s (c - u) on raw logits; 1 turns it off."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale grows: at once, or from 1 at the start of its interval to all of it at the end.
    """
    guidance_start: float = 0.0
    """Share of the codes before guidance begins."""
    guidance_end: float = 1.0
    """Share of the codes when guidance ends."""
    temperature: float = 1.0
    """0, or less than a millionth, takes the most likely code."""
    top_k: int = 0
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely codes that together reach this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep codes at least this share as likely as the most likely one; 0 keeps all."""

    def __post_init__(self) -> None:
        for value in (self.guidance_scale, self.temperature):
            if not abs(value) <= LARGEST:  # NaN fails too
                raise ValueError(
                    f"got {self}, expected a guidance_scale and a temperature between "
                    f"-{LARGEST:g} and {LARGEST:g}"
                )
        if not 0 <= self.guidance_start < self.guidance_end <= 1:
            raise ValueError(f"got {self}, expected 0 <= guidance_start < guidance_end <= 1")
        in_range = self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1
        if not (in_range and 0 <= self.min_p <= 1):
            raise ValueError(
                f"got {self}, expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 "
                "and 0 <= min_p <= 1"
            )


def read_sampling(config: PretrainedConfig) -> SamplingConfig:
    """How those who trained a generator recommend to sample from it."""
    values = dict(getattr(config, "sampling", {}))
    values.pop("window", None)  # an option that older generators recorded
    return SamplingConfig(**values)


@torch.inference_mode()
def sample_codes(
    model: Qwen3ForCausalLM,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    vocabulary: VisualVocabulary,
    config: SamplingConfig,
    seeds: Sequence[int],
    *,
    compile: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Codes (B, N) in [0, K), on the CPU: one image per prompt.

    Args:
        prompts: ids of each prompt, ending in BOI; lengths may differ.
        unconditional: ids of the prompt without caption, for guidance.
        seeds: one per image.
        compile: compile the forward pass; for CUDA, where it is recorded as a graph.
        progress: called after every step with (codes done, N).

    Raises:
        ValueError: when prompts and seeds differ in number, a prompt does not end in BOI, or
            guidance is asked of a model that was trained without it.
    """
    if not seeds or len(prompts) != len(seeds):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many, at least one"
        )
    for prompt in (*prompts, unconditional):
        if not prompt or prompt[-1] != vocabulary.begin_of_image:
            raise ValueError(
                f"got a prompt that does not end in BOI ({vocabulary.begin_of_image}): "
                "make it with PromptEncoder"
            )
    scales = guidance_scales(config, vocabulary.num_codes)
    guided = any(scale != 1 for scale in scales)
    if guided and getattr(model.config, "caption_dropout", None) == 0:
        raise ValueError(
            "got guidance, but this generator was trained with caption_dropout 0 and knows no "
            "unconditional prompt: set guidance_scale=1, or train with caption_dropout=0.1"
        )
    # BOI is fed in the loop, as the token before the first code.
    sequences = [tuple(prompt[:-1]) for prompt in prompts]
    if guided:
        sequences += [tuple(unconditional[:-1])] * len(prompts)
    rows = CachedRows(model, sequences, vocabulary.num_codes, compile=compile)
    head_KD = model.lm_head.weight[vocabulary.code_rows]
    uniforms_BN = image_uniforms(seeds, vocabulary.num_codes).to(model.device)
    ids_B = torch.full((len(prompts),), vocabulary.begin_of_image, device=model.device)
    codes = []
    for place, scale in enumerate(scales):
        hidden_RD = rows.feed(ids_B.repeat(2) if guided else ids_B)
        conditional_BK, *other = F.linear(hidden_RD, head_KD).float().split(len(prompts))
        logits_BK = conditional_BK
        if scale != 1:
            logits_BK = other[0] + scale * (conditional_BK - other[0])
        codes.append(draw_codes(logits_BK, uniforms_BN[:, place], config))
        ids_B = vocabulary.to_ids(codes[-1])
        if progress is not None:
            progress(len(codes), vocabulary.num_codes)
    return torch.stack(codes, dim=1).cpu()


# ---- logits -> codes


def guidance_scales(config: SamplingConfig, num_codes: int) -> list[float]:
    """The guidance scale of each code; exactly 1 outside the interval."""
    first = round(config.guidance_start * num_codes)
    last = round(config.guidance_end * num_codes)
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda _: 1.0,
        "linear": lambda x: x,
        "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    }
    scales = [1.0] * num_codes
    for place in range(first, last):
        share = (place - first) / max(last - first - 1, 1)
        scales[place] += (config.guidance_scale - 1) * shapes[config.guidance_schedule](share)
    return scales


def draw_codes(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> Tensor:
    """Codes (B,) from logits (B, K) and uniforms (B,) in [0, 1), by inverse transform sampling."""
    if config.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    cumulative = filter_logits(logits.float(), config).softmax(-1, dtype=torch.float64).cumsum(-1)
    # `right`: the first code whose cumulative probability exceeds the number, which is never one of
    # probability 0.
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Apply temperature, top-k, top-p and min-p to logits (B, K); what is excluded becomes -inf."""
    logits = logits / config.temperature
    keep_k = min(config.top_k or logits.shape[-1], logits.shape[-1])
    # Each filter keeps the logits above a cut: nothing is scattered back, and top-p sorts only what
    # top-k kept.
    cut = logits.new_full((len(logits), 1), -torch.inf)
    if config.top_k or config.top_p < 1:
        top = logits.topk(keep_k).values  # sorted, largest first
        cut = top[:, -1:]
        if config.top_p < 1:
            probabilities = top.softmax(-1)
            mass_before = probabilities.cumsum(-1) - probabilities
            kept = top.masked_fill(mass_before >= config.top_p, torch.inf)
            cut = kept.min(-1, keepdim=True).values
    if config.min_p > 0:
        likeliest = logits.max(-1, keepdim=True).values
        cut = torch.maximum(cut, likeliest + torch.tensor(config.min_p).log())
    return logits.masked_fill(logits < cut, -torch.inf)


def image_uniforms(seeds: Sequence[int], num_codes: int) -> Tensor:
    """Uniform numbers (B, N) in [0, 1), each row from its own seed.

    Raises:
        ValueError: for a seed of more than 64 bits.
    """
    rows = []
    for seed in seeds:
        if seed not in SEEDS:
            raise ValueError(f"got seed {seed}, expected {SEEDS[0]} to {SEEDS[-1]}")
        rows.append(torch.rand(num_codes, generator=torch.Generator().manual_seed(seed)))
    # float64 of float32 numbers never rounds to 1.
    return torch.stack(rows).double()


# ---- the forward pass


class CachedRows:
    """Sequences that grow together: every row has the same slots, short prompts are padded in
    front.

    Args:
        prompts: ids of each row, of any lengths; equal ones are computed once.
        num_codes: slots after the prompt.
        compile: compile the forward pass, on CUDA into a graph without launch overhead. Shapes are
            then the same in every step: attention runs over the whole buffer, where it otherwise
            sees only what is filled.

    Raises:
        ValueError: when the model's attention takes no mask of ours.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        prompts: Sequence[tuple[int, ...]],
        num_codes: int,
        *,
        compile: bool = False,
    ) -> None:
        attention = model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"attention is {attention!r}, expected sdpa or eager: reload the model"
            )
        self.compile, self.run = compile, model.model
        self.filled = max(len(prompt) for prompt in prompts)
        num_slots = self.filled + num_codes
        if compile:
            self.run = torch.compile(model.model, mode="reduce-overhead")
            num_slots = -(-num_slots // 64) * 64  # prompts of similar length share compiled code
        self.slots_S = torch.arange(num_slots, device=model.device)
        self.cache = StaticCache(model, len(prompts), num_slots)

        # Prefill: every different prompt once, in the first rows of the buffer, then copied to all.
        different, length = list(dict.fromkeys(prompts)), self.filled
        chosen = [different.index(prompt) for prompt in prompts]
        chosen_R = torch.tensor(chosen, device=model.device)
        padding = torch.tensor([length - len(p) for p in different], device=model.device)[:, None]
        # Added to attention scores. The lowest number instead of -inf: rows of padding see nothing,
        # and would become NaN.
        blocked = torch.finfo(model.dtype).min
        mask = torch.full((len(different), num_slots), blocked, dtype=model.dtype).to(model.device)
        slots = self.slots_S[:length]
        mask[:, :length].masked_fill_(slots >= padding, 0)
        if length > 0:
            causal = mask[:, None, None, :length].masked_fill(slots > slots[:, None], blocked)
            ids = torch.tensor(pad_left(different, 0), device=model.device)
            self._forward(model.model, ids, (slots - padding).clamp(min=0), causal, slots)
        for layer in self.cache.layers:
            layer[:, :, :, :length] = layer[:, chosen_R, :, :length]
        self.padding_R1, self.mask_RS = padding[chosen_R], mask[chosen_R]

    def feed(self, ids: Tensor) -> Tensor:
        """Hidden states (R, D) of the next ids (R,), which all later ones see."""
        slot = self.slots_S[self.filled : self.filled + 1]
        self.mask_RS[:, self.filled] = 0
        self.filled += 1
        mask = self.mask_RS if self.compile else self.mask_RS[:, : self.filled]
        positions = slot - self.padding_R1
        return self._forward(self.run, ids[:, None], positions, mask[:, None, None], slot)[:, 0]

    def _forward(
        self, run: Any, ids: Tensor, positions: Tensor, mask: Tensor, slots: Tensor
    ) -> Tensor:
        self.cache.write_to(slots, rows=len(ids), length=mask.shape[-1])
        output = run(
            input_ids=ids,
            attention_mask={"full_attention": mask},  # transformers would build it again
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state


class StaticCache:
    """Keys and values of every layer, written in place; `update` is all that `Qwen3Model` calls."""

    def __init__(self, model: Qwen3ForCausalLM, num_rows: int, num_slots: int) -> None:
        config = model.config
        shape = (2, num_rows, config.num_key_value_heads, num_slots, config.head_dim)
        self.layers = []
        for _ in range(config.num_hidden_layers):
            # Zeros: a masked slot has weight 0 in the sum over values, which NaN would survive.
            layer = torch.zeros(shape, dtype=model.dtype, device=model.device)
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
