"""Sampling: guidance, cache, seeds, and filters equal to those of transformers."""

import pytest
import torch
from transformers import Qwen3ForCausalLM
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vqrae.generation.sampling import SamplingConfig, draw_codes, filter_logits, image_uniforms, sample_codes
from vqrae.generation.vocabulary import VisualVocabulary

BOI = 164
PROMPTS = [[5, 6, 7, BOI], [8, BOI], [9, 10, 11, 12, 13, BOI], [5, 14, BOI]]
UNCONDITIONAL = [3, BOI]
SAMPLED = SamplingConfig(guidance_scale=3.0, top_k=40, top_p=0.95, min_p=0.01, temperature=0.9)
GREEDY = SamplingConfig(guidance_scale=3.0, temperature=0)


def sample(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, config: SamplingConfig, rows: list[int], **options: bool):
    prompts = [PROMPTS[i % 4] for i in rows]
    return sample_codes(model, prompts, UNCONDITIONAL, vocabulary, config, [100 + i for i in rows], **options)


@pytest.mark.parametrize("config", [GREEDY, SAMPLED, SamplingConfig(guidance_scale=1)])
def test_cached_equals_uncached(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, config: SamplingConfig) -> None:
    cached = sample(model, vocabulary, config, [0, 1, 2, 3])
    assert cached.shape == (4, 16)
    assert 0 <= cached.min() <= cached.max() < 64
    assert torch.equal(cached, sample(model, vocabulary, config, [0, 1, 2, 3], use_cache=False))


@pytest.mark.parametrize("config", [GREEDY, SAMPLED])
def test_a_picture_does_not_depend_on_its_neighbours(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, config: SamplingConfig
) -> None:
    together = sample(model, vocabulary, config, [0, 1, 2, 3, 4, 5])
    for i in range(6):
        assert torch.equal(together[i], sample(model, vocabulary, config, [i])[0])
    assert torch.equal(together.flip(0), sample(model, vocabulary, config, [5, 4, 3, 2, 1, 0]))


def test_seeds_differ(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    codes = sample_codes(model, [PROMPTS[0]] * 2, UNCONDITIONAL, vocabulary, SAMPLED, [0, 1])
    assert not torch.equal(codes[0], codes[1])


@torch.no_grad()
def test_greedy_equals_plain_transformers(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    """Without guidance: one row at a time, no cache, no padding, logits of text ids masked."""
    ours = sample(model, vocabulary, SamplingConfig(guidance_scale=1, temperature=0), [0, 1, 2, 3])
    for row, prompt in zip(ours, PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        for code in row:
            logits = model(input_ids=ids).logits[0, -1]
            logits[: vocabulary.offset] = logits[vocabulary.begin_of_image :] = -torch.inf
            assert logits.argmax() == vocabulary.offset + code
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)


def test_guidance_1_is_the_conditional_row_alone(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    rows = [0, 1, 2, 3]
    alone = sample(model, vocabulary, SamplingConfig(guidance_scale=1), rows)
    nearly = sample(model, vocabulary, SamplingConfig(guidance_scale=1 + 1e-6), rows)  # runs the unconditional rows too
    assert torch.equal(alone, nearly)
    assert not torch.equal(alone, sample(model, vocabulary, SamplingConfig(guidance_scale=5), rows))


@torch.no_grad()
def test_guidance_extrapolates_raw_logits(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    code = sample_codes(model, [PROMPTS[0]], UNCONDITIONAL, vocabulary, GREEDY, [0])[0, 0]
    conditional, unconditional = (
        model(input_ids=torch.tensor([prompt])).logits[0, -1, vocabulary.code_rows] for prompt in (PROMPTS[0], UNCONDITIONAL)
    )
    assert code == (unconditional + 3 * (conditional - unconditional)).argmax()


def test_guidance_without_caption_dropout_is_refused(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    model.config.caption_dropout = 0
    with pytest.raises(ValueError, match=r"caption_dropout 0.*guidance_scale=1"):
        sample(model, vocabulary, GREEDY, [0])
    sample(model, vocabulary, SamplingConfig(guidance_scale=1), [0])


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


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected temperature >= 0"):
        SamplingConfig(**options)
