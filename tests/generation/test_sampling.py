"""Sampling: guidance, cache, seeds, windows, and filters equal to those of transformers."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.sampling import (
    SamplingConfig,
    draw_codes,
    filter_logits,
    guidance_scales,
    image_uniforms,
    sample_codes,
)

BOI = 164
PROMPTS = [[5, 6, 7, BOI], [8, BOI], [9, 10, 11, 12, 13, BOI], [5, 14, BOI]]
UNCONDITIONAL = [3, BOI]
SAMPLED = SamplingConfig(guidance_scale=3.0, top_k=40, top_p=0.95, min_p=0.01, temperature=0.9)
GREEDY = SamplingConfig(guidance_scale=3.0, temperature=0)


def sample(
    model: Qwen3ForCausalLM,
    vocabulary: VisualVocabulary,
    config: SamplingConfig,
    rows: list[int],
    **options: Any,
):
    prompts = [PROMPTS[i % 4] for i in rows]
    return sample_codes(
        model, prompts, UNCONDITIONAL, vocabulary, config, [100 + i for i in rows], **options
    )


@torch.no_grad()
def uncached(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, config: SamplingConfig, row: int
) -> Tensor:
    """What `sample` must give, as plainly as it can be said: one image, no cache, no padding, every row at every code."""
    uniforms = image_uniforms([100 + row], vocabulary.num_codes)
    codes: list[int] = []
    for i, scale in enumerate(guidance_scales(config, vocabulary.num_codes)):
        ids = [vocabulary.offset + code for code in codes]
        with_caption, without = (
            model(input_ids=torch.tensor([prompt + ids])).logits[:, -1, vocabulary.code_rows]
            for prompt in (PROMPTS[row % 4], UNCONDITIONAL)
        )
        codes += draw_codes(
            without + scale * (with_caption - without), uniforms[:, i], config
        ).tolist()
    return torch.tensor(codes)


@pytest.mark.parametrize(
    "config",
    [
        GREEDY,
        SAMPLED,
        SamplingConfig(guidance_scale=1),
        SamplingConfig(guidance_scale=3, guidance_schedule="linear"),
        SamplingConfig(
            guidance_scale=3, guidance_schedule="cosine", guidance_start=0.25, guidance_end=0.75
        ),
        SamplingConfig(guidance_scale=3, guidance_end=0.5),
        SamplingConfig(guidance_scale=3, guidance_start=0.5),
    ],
)
def test_cached_equals_uncached(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, config: SamplingConfig
) -> None:
    """Prompts of different lengths, some of them equal, side by side."""
    rows = [0, 1, 2, 3, 4]
    cached = sample(model, vocabulary, config, rows)
    assert cached.shape == (5, 16)
    assert 0 <= cached.min() <= cached.max() < 64
    assert torch.equal(
        cached, torch.stack([uncached(model, vocabulary, config, row) for row in rows])
    )


@pytest.fixture
def shapes(model: Qwen3ForCausalLM) -> list[tuple[int, int]]:
    """(rows, tokens) of every forward pass from here on."""
    seen: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_prompts_are_computed_once_and_guidance_in_the_same_pass(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, shapes: list[tuple[int, int]]
) -> None:
    sample_codes(
        model, [PROMPTS[0], PROMPTS[2], PROMPTS[0]], UNCONDITIONAL, vocabulary, SAMPLED, [0, 1, 2]
    )
    assert shapes == [(3, 5)] + 16 * [(6, 1)]  # two captions and none, without BOI


def test_without_guidance_the_rows_without_caption_do_not_run(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, shapes: list[tuple[int, int]]
) -> None:
    sample(model, vocabulary, SamplingConfig(guidance_scale=1), [0, 1])
    assert shapes == [(2, 3)] + 16 * [(2, 1)]


def test_only_the_rows_of_the_codes_become_logits(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    """Whatever the other rows of the head hold, they are not read."""
    expected = sample(model, vocabulary, SAMPLED, [0, 1])
    head = torch.full_like(model.lm_head.weight, torch.nan)
    head[vocabulary.code_rows] = model.lm_head.weight[vocabulary.code_rows].detach()
    model.lm_head.weight = torch.nn.Parameter(head)  # no longer tied to the embedding
    assert torch.equal(expected, sample(model, vocabulary, SAMPLED, [0, 1]))


@pytest.mark.parametrize("config", [GREEDY, SAMPLED])
def test_a_image_does_not_depend_on_its_neighbours(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, config: SamplingConfig
) -> None:
    together = sample(model, vocabulary, config, [0, 1, 2, 3, 4, 5])
    for i in range(6):
        assert torch.equal(together[i], sample(model, vocabulary, config, [i])[0])
    assert torch.equal(together.flip(0), sample(model, vocabulary, config, [5, 4, 3, 2, 1, 0]))


def test_seeds_differ(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    codes = sample_codes(model, [PROMPTS[0]] * 2, UNCONDITIONAL, vocabulary, SAMPLED, [0, 1])
    assert not torch.equal(codes[0], codes[1])


def test_guidance_1_is_the_conditional_row_alone(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    rows = [0, 1, 2, 3]
    alone = sample(model, vocabulary, SamplingConfig(guidance_scale=1), rows)
    nearly = sample(
        model, vocabulary, SamplingConfig(guidance_scale=1 + 1e-6), rows
    )  # runs the unconditional rows too
    assert torch.equal(alone, nearly)
    assert not torch.equal(alone, sample(model, vocabulary, SamplingConfig(guidance_scale=5), rows))


@torch.no_grad()
def test_guidance_extrapolates_raw_logits(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    code = sample_codes(model, [PROMPTS[0]], UNCONDITIONAL, vocabulary, GREEDY, [0])[0, 0]
    conditional, unconditional = (
        model(input_ids=torch.tensor([prompt])).logits[0, -1, vocabulary.code_rows]
        for prompt in (PROMPTS[0], UNCONDITIONAL)
    )
    assert code == (unconditional + 3 * (conditional - unconditional)).argmax()


def test_guidance_without_caption_dropout_is_refused(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    model.config.caption_dropout = 0
    with pytest.raises(ValueError, match=r"caption_dropout 0.*guidance_scale=1"):
        sample(model, vocabulary, GREEDY, [0])
    sample(model, vocabulary, SamplingConfig(guidance_scale=1), [0])


def test_guidance_scales() -> None:
    config = functools.partial(SamplingConfig, guidance_scale=5.0)
    assert guidance_scales(config(), 4) == [5, 5, 5, 5]
    assert guidance_scales(config(guidance_start=0.25, guidance_end=0.5), 8) == [
        1,
        1,
        5,
        5,
        1,
        1,
        1,
        1,
    ]
    assert guidance_scales(config(guidance_schedule="linear"), 5) == [1, 2, 3, 4, 5]
    assert guidance_scales(config(guidance_schedule="linear", guidance_end=0.5), 6) == [
        1,
        3,
        5,
        1,
        1,
        1,
    ]
    cosine = guidance_scales(config(guidance_schedule="cosine"), 5)
    assert cosine == pytest.approx([1, 1 + 2 * (1 - 0.5**0.5), 3, 1 + 2 * (1 + 0.5**0.5), 5])
    assert guidance_scales(SamplingConfig(guidance_scale=1, guidance_schedule="linear"), 3) == [
        1,
        1,
        1,
    ]


def test_a_compiled_pass_draws_the_same(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing the whole model without a break; generating machine code is left out, it takes a minute on a CPU."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, mode: compile(module, backend="eager", fullgraph=True)
    )
    plain = sample(model, vocabulary, SAMPLED, [0, 1, 2])
    assert torch.equal(plain, sample(model, vocabulary, SAMPLED, [0, 1, 2], compile=True))


def test_attention_takes_a_mask_or_is_refused(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    expected = sample(model, vocabulary, SAMPLED, [0, 1, 2])
    model.set_attn_implementation("eager")
    assert torch.equal(expected, sample(model, vocabulary, SAMPLED, [0, 1, 2]))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2', expected sdpa or eager"):
        sample(model, vocabulary, SAMPLED, [0])


def test_prompts_end_in_boi(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    with pytest.raises(ValueError, match="does not end in BOI"):
        sample_codes(model, [[5, 6]], UNCONDITIONAL, vocabulary, GREEDY, [0])


def test_prompts_need_seeds(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sample_codes(model, PROMPTS[:2], UNCONDITIONAL, vocabulary, GREEDY, [0])


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
     {"top_k": 1000, "top_p": 0.01}, {"temperature": 1.7, "min_p": 1.0}],
)  # fmt: skip
def test_filters_equal_transformers(options: dict[str, float]) -> None:
    config = SamplingConfig(**options)
    logits = 3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(config.temperature))])
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        warpers.append(MinPLogitsWarper(config.min_p))
    torch.testing.assert_close(filter_logits(logits, config), warpers(None, logits))


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    logits = probabilities.log().expand(20_000, -1)
    uniforms = image_uniforms([0], 20_000)[0]
    uniforms[0], uniforms[1] = 0.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).double()
    codes = draw_codes(logits, uniforms, SamplingConfig())
    shares = torch.bincount(codes, minlength=6) / 20_000
    assert codes[:2].tolist() == [1, 4]
    assert shares[[0, 2, 5]].sum() == 0
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected temperature >= 0"):
        SamplingConfig(**options)


@pytest.mark.parametrize(
    "options", [{"guidance_start": 0.5, "guidance_end": 0.5}, {"guidance_end": 1.1}]
)
def test_bad_interval(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= guidance_start"):
        SamplingConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")},
        {"temperature": 1e7},
        {"guidance_scale": float("nan")},
        {"guidance_scale": 1e30},
    ],
)
def test_numbers_that_logits_do_not_survive(options: dict[str, float]) -> None:
    with pytest.raises(
        ValueError, match=r"expected a guidance_scale and a temperature between -1e\+06 and 1e\+06"
    ):
        SamplingConfig(**options)


def test_next_to_no_temperature_is_greedy(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    cold = dataclasses.replace(GREEDY, temperature=1e-40)
    assert torch.equal(
        sample(model, vocabulary, cold, [0, 1]), sample(model, vocabulary, GREEDY, [0, 1])
    )


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_have_64_bits(seed: int) -> None:
    assert image_uniforms([2**64 - 1, -(2**63)], 4).shape == (2, 4)
    with pytest.raises(
        ValueError, match=f"got seed {seed}, expected -9223372036854775808 to 18446744073709551615"
    ):
        image_uniforms([seed], 4)
