"""Sampling codes with guidance, on static buffers of keys and values.

Equal prompts are computed once, guidance runs in the same forward pass, and only codes become
logits. Every image has its own seed: its N n uniform numbers come first, and each code is read off
the inverse of its cumulative distribution. So an image does not depend on its batch (up to
rounding).

Shapes: B images, R rows (the images, then as many without caption), D width, N positions of an
image, n codes of a position, K codes of a codebook.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vqrae.generation.decoding import CachedRows
from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.multi_code import generator_parts

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


def read_sampling(config: PreTrainedConfig) -> SamplingConfig:
    """How those who trained a generator recommend to sample from it."""
    values = dict(getattr(config, "sampling", {}))
    values.pop("window", None)  # an option that older generators recorded
    return SamplingConfig(**values)


@torch.inference_mode()
def sample_codes(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    vocabulary: VisualVocabulary,
    config: SamplingConfig,
    seeds: Sequence[int],
    *,
    compile: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Codes (B, N), or (B, N, n), in [0, K), on the CPU: one image per prompt.

    Args:
        progress: called after every step with (positions done, N).
        model, prompts, unconditional, vocabulary, seeds, compile: as of `codes_in_turn`, whose
            errors are these.
    """
    codes: list[Tensor] = []
    steps = codes_in_turn(model, prompts, unconditional, vocabulary, config, seeds, compile=compile)
    for step in steps:
        codes.append(step)
        if progress is not None:
            progress(len(codes), vocabulary.num_codes)
    return torch.stack(codes, dim=1).cpu()


@torch.inference_mode()
def codes_in_turn(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    vocabulary: VisualVocabulary,
    config: SamplingConfig,
    seeds: Sequence[int],
    *,
    compile: bool = False,
) -> Iterator[Tensor]:
    """The codes (B,), or (B, n), of one position after the other, on the model's device.

    Args:
        model: a generator, see `generator_parts`.
        prompts: ids of each prompt, ending in BOI; lengths may differ.
        unconditional: ids of the prompt without caption, for guidance.
        seeds: one per image.
        compile: compile the forward pass; for CUDA, where it is recorded as a graph.

    Raises:
        ValueError: when prompts and seeds differ in number, a prompt does not end in BOI, or
            guidance is asked of a model that was trained without it.
    """
    scales = guidance_scales(config, vocabulary.num_codes)
    guided = any(scale != 1 for scale in scales)
    check_request(model, prompts, unconditional, vocabulary, seeds, guided=guided)
    # The ends are fed in the loop, as the vectors before the first position.
    sequences = [tuple(prompt[:-1]) for prompt in prompts]
    if guided:
        sequences += [tuple(unconditional[:-1])] * len(prompts)
    decoder, embedding, head = generator_parts(model, vocabulary)
    num_slots = max(map(len, sequences)) + vocabulary.num_codes
    if compile:
        num_slots = -(-num_slots // 64) * 64  # prompts of similar length share compiled code
    rows = CachedRows(decoder, len(sequences), num_slots, compile=compile)
    rows.prefill(sequences)
    codes_cache = embedding.start(len(prompts), vocabulary.num_codes)
    depth_steps = head.start(len(sequences), compile=compile)
    uniforms = image_uniforms(seeds, vocabulary.num_codes * vocabulary.num_codebooks)
    uniforms_BNn = uniforms.view(len(seeds), vocabulary.num_codes, -1).to(model.device)
    ends = [prompt[-1] for prompt in prompts] + [unconditional[-1]] * len(prompts)
    ends_R = torch.tensor(ends[: len(sequences)], device=model.device)
    inputs_RD = decoder.get_input_embeddings()(ends_R)
    for place, scale in enumerate(scales):
        hidden_RD = rows.feed(inputs_RD)

        def draw(book: int, logits_RK: Tensor, scale: float = scale, place: int = place) -> Tensor:
            conditional_BK, *other = logits_RK.split(len(prompts))
            logits_BK = guide(conditional_BK, other[0], scale) if other else conditional_BK
            return draw_codes(logits_BK, uniforms_BNn[:, place, book], config)

        codes = head.sample(hidden_RD, draw, depth_steps)
        yield codes
        if place + 1 < vocabulary.num_codes:
            inputs_BD = embedding(codes[:, None], codes_cache)[:, 0]
            inputs_RD = inputs_BD.repeat(2, 1) if guided else inputs_BD


def check_request(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    vocabulary: VisualVocabulary,
    seeds: Sequence[int],
    *,
    guided: bool,
) -> None:
    """Refuse what `sample_codes` cannot do."""
    if not seeds or len(prompts) != len(seeds):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many, at least one"
        )
    ends = vocabulary.prompt_ends
    for prompt in (*prompts, unconditional):
        if not prompt or prompt[-1] not in ends:
            raise ValueError(
                f"got a prompt that does not end in BOI or a class ({ends[0]} to {ends[-1]}): "
                "make it with PromptEncoder or ClassEncoder"
            )
    if guided and getattr(model.config, "caption_dropout", None) == 0:
        raise ValueError(
            "got guidance, but this generator was trained with caption_dropout 0 and knows no "
            "unconditional prompt: set guidance_scale=1, or train with caption_dropout=0.1"
        )


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


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guided logits u + s (c - u), any shape; exactly the conditional ones for a scale of 1."""
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)


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
