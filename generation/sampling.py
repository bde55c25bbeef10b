"""Sampling codes: key-value cache, classifier-free guidance in one batch, logits of the visual rows only.

Every picture has a seed of its own: its N uniform numbers are drawn up front and each code is read off the inverse of
its cumulative distribution, so that a picture does not depend on the batch it is sampled in (up to float rounding).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from vqrae.generation.vocabulary import VisualVocabulary, pad_left


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a code is drawn from the model's logits; filters apply in the order of transformers."""

    guidance_scale: float = 4.5
    """Classifier-free guidance u + s (c - u) on raw logits; 1 turns it off and skips the unconditional rows."""
    temperature: float = 1.0
    """0 takes the most likely code."""
    top_k: int = 0
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely codes that together reach this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep codes at least this share as likely as the most likely one; 0 keeps all."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"got {self}, expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1")


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
            cut = top.masked_fill(mass_before >= config.top_p, torch.inf).min(-1, keepdim=True).values
    if config.min_p > 0:
        cut = torch.maximum(cut, logits.max(-1, keepdim=True).values + torch.tensor(config.min_p).log())
    return logits.masked_fill(logits < cut, -torch.inf)


def draw_codes(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> Tensor:
    """Codes (B,) from logits (B, K) and uniforms (B,) in [0, 1), by the inverse of the cumulative distribution."""
    if config.temperature == 0:
        return logits.argmax(-1)
    cumulative = filter_logits(logits.float(), config).softmax(-1, dtype=torch.float64).cumsum(-1)
    # `right`: the first code whose cumulative probability exceeds the number, which is never one of probability 0.
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


def image_uniforms(seeds: Sequence[int], num_codes: int) -> Tensor:
    """Uniform numbers (B, N), each row from its own seed; float64 of float32 numbers, so that 1 is never reached."""
    rows = [torch.rand(num_codes, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).double()


class _PreallocatedLayer(DynamicLayer):
    """Keys and values written in place into one buffer, where `DynamicLayer` copies everything at every step."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length, self.length = max_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self._key_buffer = key_states.new_empty(rows, heads, self.max_length, width)
            self._value_buffer = torch.empty_like(self._key_buffer)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self._key_buffer[:, :, start : self.length] = key_states
        self._value_buffer[:, :, start : self.length] = value_states
        self.keys, self.values = self._key_buffer[:, :, : self.length], self._value_buffer[:, :, : self.length]
        return self.keys, self.values


class _Rows:
    """Left-padded sequences that grow by one token per step; `logits()` are those of the visual rows."""

    def __init__(
        self, model: Qwen3ForCausalLM, prompts: list[list[int]], vocabulary: VisualVocabulary, use_cache: bool
    ) -> None:
        device = model.device
        self.model, self.vocabulary = model, vocabulary
        self.head = model.lm_head.weight[vocabulary.code_rows]
        self.ids = torch.tensor(pad_left(prompts, 0), device=device)
        self.mask = torch.tensor(pad_left([[1] * len(prompt) for prompt in prompts], 0), device=device)
        length = self.ids.shape[1] + vocabulary.num_codes
        layers: list = [_PreallocatedLayer(length) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=layers) if use_cache else None

    def logits(self) -> Tensor:
        """Logits (rows, K) of the next code."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        seen = self.cache.get_seq_length() if self.cache is not None else 0
        output = self.model.model(
            input_ids=self.ids[:, seen:],
            attention_mask=self.mask,
            position_ids=positions[:, seen:],
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        )
        return F.linear(output.last_hidden_state[:, -1], self.head).float()

    def append(self, codes: Tensor) -> None:
        """Add one code (rows,) to every sequence."""
        self.ids = torch.cat([self.ids, self.vocabulary.to_ids(codes)[:, None]], dim=1)
        self.mask = F.pad(self.mask, (0, 1), value=1)


@torch.inference_mode()
def sample_codes(
    model: Qwen3ForCausalLM,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    vocabulary: VisualVocabulary,
    config: SamplingConfig,
    seeds: Sequence[int],
    *,
    use_cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample the codes of one picture per prompt.

    Args:
        prompts: ids of each prompt, ending in BOI; lengths may differ.
        unconditional: ids of the prompt without caption, for guidance.
        seeds: one seed per picture.
        use_cache: False computes the whole sequence anew for every code (slow; to test the cache against).
        progress: called after every code with (codes done, N).

    Returns:
        Codes (B, N) in [0, codebook_size), on the CPU.

    Raises:
        ValueError: when prompts and seeds differ in number, or guidance is asked of a model trained without it.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many, at least one")
    guided = config.guidance_scale != 1
    if guided and getattr(model.config, "caption_dropout", None) == 0:
        raise ValueError(
            f"got guidance_scale {config.guidance_scale}, but this generator was trained with caption_dropout 0 and knows no "
            "unconditional prompt: set guidance_scale=1, or train with caption_dropout=0.1"
        )
    conditional = [list(prompt) for prompt in prompts]
    rows = _Rows(model, conditional + [list(unconditional)] * len(prompts) * guided, vocabulary, use_cache)
    uniforms = image_uniforms(seeds, vocabulary.num_codes).to(model.device)
    codes: list[Tensor] = []
    for step in range(vocabulary.num_codes):
        logits = rows.logits()
        if guided:
            with_caption, without = logits.chunk(2)
            logits = without + config.guidance_scale * (with_caption - without)
        codes.append(draw_codes(logits, uniforms[:, step], config))
        rows.append(codes[-1].repeat(2 if guided else 1))
        if progress is not None:
            progress(step + 1, vocabulary.num_codes)
    return torch.stack(codes, dim=1).cpu()
