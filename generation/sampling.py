"""Sampling codes: a static cache, prompts computed once, guidance in the same batch, logits of the visual rows only.

Every image has a seed of its own: its N uniform numbers are drawn up front and each code is read off the inverse of
its cumulative distribution, so that an image does not depend on the batch it is sampled in (up to float rounding).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

from vqrae.generation.decoding import CachedRows, decoding_steps
from vqrae.generation.vocabulary import VisualVocabulary

GREEDY_BELOW = 1e-6  # of temperature: logits divided by less overflow
LARGEST = (
    1e6  # of temperature and guidance scale: nothing changes long before, and logits stay finite
)
SEEDS = range(-(2**63), 2**64)
"""What torch's generators take."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a code is drawn from the model's logits; filters apply in the order of transformers."""

    guidance_scale: float = 4.5
    """Classifier-free guidance u + s (c - u) on raw logits; 1 turns it off and skips the unconditional rows."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale grows: at once, or from 1 at the start of its interval to the full scale at the end."""
    guidance_start: float = 0.0
    """Share of the image that is drawn before guidance begins."""
    guidance_end: float = 1.0
    """Share of the image that is drawn when guidance ends. Outside its interval the unconditional rows cost nothing."""
    temperature: float = 1.0
    """0, or less than a millionth, takes the most likely code."""
    top_k: int = 0
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely codes that together reach this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep codes at least this share as likely as the most likely one; 0 keeps all."""
    window: int = 0
    """Begin a row when the one above is this many codes ahead, for several times fewer steps of lower quality; 0 draws
    code after code (see `vqrae.generation.decoding.decoding_steps`)."""

    def __post_init__(self) -> None:
        numbers = (self.guidance_scale, self.temperature)
        if not all(math.isfinite(value) and abs(value) <= LARGEST for value in numbers):
            raise ValueError(
                f"got {self}, expected a guidance_scale and a temperature between -{LARGEST:g} and {LARGEST:g}"
            )
        if not 0 <= self.guidance_start < self.guidance_end <= 1 or self.window < 0:
            raise ValueError(
                f"got {self}, expected 0 <= guidance_start < guidance_end <= 1 and window >= 0"
            )
        if (
            self.temperature < 0
            or self.top_k < 0
            or not 0 < self.top_p <= 1
            or not 0 <= self.min_p <= 1
        ):
            raise ValueError(
                f"got {self}, expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1"
            )


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Apply temperature, top-k, top-p and min-p to logits (B, K); what is excluded becomes -inf.

    Each filter keeps the logits above a cut, so nothing is scattered back, and top-p sorts only what top-k kept.
    """
    logits = logits / config.temperature
    keep_k = min(config.top_k or logits.shape[-1], logits.shape[-1])
    cut = logits.new_full((len(logits), 1), -torch.inf)
    if config.top_k or config.top_p < 1:
        top = logits.topk(keep_k).values  # sorted, largest first
        cut = top[:, -1:]
        if config.top_p < 1:
            probabilities = top.softmax(-1)
            mass_before = probabilities.cumsum(-1) - probabilities
            cut = (
                top.masked_fill(mass_before >= config.top_p, torch.inf).min(-1, keepdim=True).values
            )
    if config.min_p > 0:
        cut = torch.maximum(
            cut, logits.max(-1, keepdim=True).values + torch.tensor(config.min_p).log()
        )
    return logits.masked_fill(logits < cut, -torch.inf)


def draw_codes(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> Tensor:
    """Codes (B,) from logits (B, K) and uniforms (B,) in [0, 1), by the inverse of the cumulative distribution."""
    if config.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    cumulative = filter_logits(logits.float(), config).softmax(-1, dtype=torch.float64).cumsum(-1)
    # `right`: the first code whose cumulative probability exceeds the number, which is never one of probability 0.
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


def image_uniforms(seeds: Sequence[int], num_codes: int) -> Tensor:
    """Uniform numbers (B, N), each row from its own seed; float64 of float32 numbers, so that 1 is never reached.

    Raises:
        ValueError: for a seed of more than 64 bits.
    """
    for seed in seeds:
        if seed not in SEEDS:
            raise ValueError(f"got seed {seed}, expected {SEEDS[0]} to {SEEDS[-1]}")
    rows = [torch.rand(num_codes, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).double()


def guidance_scales(config: SamplingConfig, num_steps: int) -> list[float]:
    """Guidance scale of each step; exactly 1 where there is no guidance."""
    first, last = (
        round(share * num_steps) for share in (config.guidance_start, config.guidance_end)
    )
    shapes = {
        "constant": lambda x: 1.0,
        "linear": lambda x: x,
        "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    }
    scales = [1.0] * num_steps
    for step in range(first, last):
        share = (step - first) / max(last - first - 1, 1)
        scales[step] += (config.guidance_scale - 1) * shapes[config.guidance_schedule](share)
    return scales


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
    """Sample the codes of one image per prompt.

    Equal prompts are computed once. Outside the guidance interval only the rows with captions run; where it begins later
    than the image, the unconditional rows first read all codes that they missed, in one pass, so that they are where
    they would be had they always run.

    Args:
        prompts: ids of each prompt, ending in BOI; lengths may differ.
        unconditional: ids of the prompt without caption, for guidance.
        seeds: one seed per image.
        compile: compile the forward pass; for CUDA, where it is recorded as a graph.
        progress: called after every step with (codes done, N).

    Returns:
        Codes (B, N) in [0, codebook_size), on the CPU.

    Raises:
        ValueError: when prompts and seeds differ in number, a prompt does not end in BOI, or guidance is asked of a model
            trained without it.
    """
    steps = decoding_steps(vocabulary.num_codes, config.window)
    scales = guidance_scales(config, len(steps))
    guided = any(scale != 1 for scale in scales)
    _check_arguments(model, [*prompts, unconditional], len(seeds), vocabulary, guided)
    batch = len(prompts)
    sequences = [
        tuple(prompt[:-1]) for prompt in (*prompts, *[unconditional] * (batch if guided else 0))
    ]
    different = list(dict.fromkeys(sequences))
    choice = [different.index(sequence) for sequence in sequences]
    rows = CachedRows(model, different, choice, vocabulary.num_codes, compile=compile)
    captioned, without_caption, both = slice(batch), slice(batch, 2 * batch), slice(2 * batch)

    head = model.lm_head.weight[vocabulary.code_rows]
    uniforms = image_uniforms(seeds, vocabulary.num_codes).to(model.device)
    # What is fed at each place: BOI, then codes; the last code is drawn and never fed.
    inputs = torch.full(
        (batch, vocabulary.num_codes + 1), vocabulary.begin_of_image, device=model.device
    )
    all_places = [
        torch.tensor(step.drawn + step.corrected, device=model.device) for step in steps
    ]  # no copies on the way
    missed: set[int] = set()  # places that the rows without caption have not read
    done = 0
    for step, places, scale in zip(steps, all_places, scales, strict=True):
        end, drawn = step.drawn[-1] + 1, places[: len(step.drawn)]
        if step.borrowed is not None:
            place, other = step.borrowed
            inputs[:, place] = inputs[:, other]
        if scale == 1:
            missed.update(step.drawn, step.corrected)
            logits = F.linear(
                rows.feed(inputs[:, places], places, end, captioned)[:, : len(drawn)], head
            ).float()
        else:
            if missed:
                before = torch.tensor(sorted(missed), device=model.device)
                rows.feed(inputs[:, before], before, end, without_caption, once=True)
                missed.clear()
            hidden = rows.feed(inputs[:, places].repeat(2, 1), places, end, both)[:, : len(drawn)]
            with_caption, without = F.linear(hidden, head).float().chunk(2)
            logits = without + scale * (with_caption - without)
        codes = draw_codes(logits.flatten(0, 1), uniforms[:, drawn].flatten(), config)
        inputs[:, drawn + 1] = vocabulary.to_ids(codes).view(batch, -1)
        done += len(drawn)
        if progress is not None:
            progress(done, vocabulary.num_codes)
    return vocabulary.to_codes(inputs[:, 1:]).cpu()


def _check_arguments(
    model: Qwen3ForCausalLM,
    prompts: list[Sequence[int]],
    num_seeds: int,
    vocabulary: VisualVocabulary,
    guided: bool,
) -> None:
    if not num_seeds or len(prompts) - 1 != num_seeds:
        raise ValueError(
            f"got {len(prompts) - 1} prompts and {num_seeds} seeds, expected as many, at least one"
        )
    if any(not prompt or prompt[-1] != vocabulary.begin_of_image for prompt in prompts):
        raise ValueError(
            f"got a prompt that does not end in BOI ({vocabulary.begin_of_image}): make it with PromptEncoder"
        )
    if guided and getattr(model.config, "caption_dropout", None) == 0:
        raise ValueError(
            "got guidance, but this generator was trained with caption_dropout 0 and knows no unconditional prompt: "
            "set guidance_scale=1, or train with caption_dropout=0.1"
        )
