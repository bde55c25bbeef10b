"""Sampling: guidance, cache, seeds, and filters equal to those of transformers."""

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from both_systems import BOTH_SYSTEMS
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vqrae.generation import decoding
from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.multi_code import generator_parts
from vqrae.generation.sampling import (
    SamplingConfig,
    draw_codes,
    filter_logits,
    guidance_scales,
    image_uniforms,
    read_sampling,
    sample_codes,
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 14]]  # without BOI, as the unconditional one
UNCONDITIONAL = [3]
SAMPLED = SamplingConfig(guidance_scale=3.0, top_k=40, top_p=0.95, min_p=0.01, temperature=0.9)
GREEDY = SamplingConfig(guidance_scale=3.0, temperature=0)
guidance = functools.partial(SamplingConfig, guidance_scale=3.0)


@pytest.fixture
def sample(model: PreTrainedModel, vocabulary: VisualVocabulary) -> Callable[..., Tensor]:
    """Codes of prompts and seeds by number."""
    end = [vocabulary.begin_of_image]

    def codes(config: SamplingConfig, rows: list[int], **options: bool) -> Tensor:
        prompts, seeds = [PROMPTS[row % 4] + end for row in rows], [100 + row for row in rows]
        given = (prompts, UNCONDITIONAL + end, vocabulary, config, seeds)
        return sample_codes(model, *given, **options)

    return codes


@torch.no_grad()
def uncached(
    model: PreTrainedModel, vocabulary: VisualVocabulary, config: SamplingConfig, row: int
) -> Tensor:
    """What `sample` must give, as plainly as possible: one image, no cache, no padding."""
    shape = (vocabulary.num_codes, vocabulary.num_codebooks)
    uniforms = image_uniforms([100 + row], math.prod(shape)).view(shape)
    codes = torch.zeros(1, *vocabulary.code_shape, dtype=torch.int64)
    prompts = [[*ids, vocabulary.begin_of_image] for ids in (PROMPTS[row % 4], UNCONDITIONAL)]
    for place, scale in enumerate(guidance_scales(config, vocabulary.num_codes)):
        logits_of = [next_logits(model, vocabulary, ids, codes[:, :place]) for ids in prompts]
        for book in range(vocabulary.num_codebooks):
            with_caption, without = (logits(codes[:, place])[:, book] for logits in logits_of)
            logits = without + scale * (with_caption - without)
            chosen = draw_codes(logits, uniforms[place : place + 1, book], config)
            codes.view(1, *shape)[:, place, book] = chosen
    return codes[0]


def next_logits(
    model: PreTrainedModel, vocabulary: VisualVocabulary, prompt: list[int], codes: Tensor
) -> Callable[[Tensor], Tensor]:
    """Codes (1, n) of the place after these -> logits (1, n, K), each given the codes before it."""
    ids = torch.tensor([prompt])
    if vocabulary.num_codebooks == 1:
        ids = torch.cat([ids, vocabulary.to_ids(codes)], dim=1)
        logits = model(input_ids=ids).logits[:, -1:, vocabulary.code_rows]
        return lambda _: logits
    vectors = [model.get_input_embeddings()(ids), model.embedding(codes)]
    hidden = model.llm.model(inputs_embeds=torch.cat(vectors, dim=1)).last_hidden_state[:, -1]
    return functools.partial(model.head, hidden)


@BOTH_SYSTEMS
@pytest.mark.parametrize(
    "config",
    [
        GREEDY,
        SAMPLED,
        SamplingConfig(guidance_scale=1),
        guidance(guidance_schedule="linear"),
        guidance(guidance_schedule="cosine", guidance_start=0.25, guidance_end=0.75),
        guidance(guidance_end=0.5),
        guidance(guidance_start=0.5),
    ],
)
def test_cached_equals_uncached(
    sample: Callable[..., Tensor],
    model: PreTrainedModel,
    vocabulary: VisualVocabulary,
    config: SamplingConfig,
) -> None:
    """Prompts of different lengths, some of them equal, together in a batch."""
    rows = [0, 1, 2, 3, 4]
    cached = sample(config, rows)
    assert cached.shape == (5, *vocabulary.code_shape)
    plain = [uncached(model, vocabulary, config, row) for row in rows]
    assert torch.equal(cached, torch.stack(plain))


@BOTH_SYSTEMS
@pytest.mark.parametrize("config", [GREEDY, SAMPLED])
def test_an_image_does_not_depend_on_its_batch(
    sample: Callable[..., Tensor], config: SamplingConfig
) -> None:
    together = sample(config, [0, 1, 2, 3, 4, 5])
    for i in range(6):
        assert torch.equal(together[i], sample(config, [i])[0])
    assert torch.equal(together.flip(0), sample(config, [5, 4, 3, 2, 1, 0]))


@BOTH_SYSTEMS
def test_prompts_are_computed_once_and_guidance_in_the_same_pass(
    sample: Callable[..., Tensor],
    model: PreTrainedModel,
    vocabulary: VisualVocabulary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    decoder, _, _ = generator_parts(model, vocabulary)
    # transformers' own pass, which a hook sees
    monkeypatch.setattr(decoding, "has_plain_layers", lambda _: False)
    decoder.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    codes = sample(SAMPLED, [0, 2, 4])
    steps = vocabulary.num_codes
    assert seen == [(3, 5)] + steps * [(6, 1)]  # two captions and none, without BOI
    assert not torch.equal(codes[0], codes[2])  # one prompt, two seeds
    seen.clear()
    sample(SamplingConfig(guidance_scale=1), [0, 1])
    assert seen == [(2, 3)] + steps * [(2, 1)]


def test_only_the_rows_of_the_codes_become_logits(
    sample: Callable[..., Tensor], model: PreTrainedModel, vocabulary: VisualVocabulary
) -> None:
    """Whatever the other rows of the head hold, they are not read."""
    expected = sample(SAMPLED, [0, 1])
    head = torch.full_like(model.lm_head.weight, torch.nan)
    head[vocabulary.code_rows] = model.lm_head.weight[vocabulary.code_rows].detach()
    model.lm_head.weight = torch.nn.Parameter(head)  # no longer tied to the embedding
    assert torch.equal(expected, sample(SAMPLED, [0, 1]))


def test_guidance_scales() -> None:
    scales = functools.partial(SamplingConfig, guidance_scale=5.0)
    half = guidance_scales(scales(guidance_start=0.25, guidance_end=0.5), 8)
    assert half == [1, 1, 5, 5, 1, 1, 1, 1]
    assert guidance_scales(scales(guidance_schedule="linear"), 5) == [1, 2, 3, 4, 5]
    part = guidance_scales(scales(guidance_schedule="linear", guidance_end=0.5), 6)
    assert part == [1, 3, 5, 1, 1, 1]
    cosine = guidance_scales(scales(guidance_schedule="cosine"), 5)
    assert cosine == pytest.approx([1, 1 + 2 * (1 - 0.5**0.5), 3, 1 + 2 * (1 + 0.5**0.5), 5])
    assert guidance_scales(SamplingConfig(guidance_scale=1), 2) == [1, 1]


@BOTH_SYSTEMS
def test_a_compiled_pass_samples_the_same(
    sample: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model is traced without a break; machine code would take a minute on a CPU."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, mode: compile(module, backend="eager", fullgraph=True)
    )
    plain = sample(SAMPLED, [0, 1, 2])
    assert torch.equal(plain, sample(SAMPLED, [0, 1, 2], compile=True))


@BOTH_SYSTEMS
def test_attention_takes_a_mask_or_is_refused(
    sample: Callable[..., Tensor], model: PreTrainedModel, vocabulary: VisualVocabulary
) -> None:
    expected = sample(SAMPLED, [0, 1, 2])
    model.set_attn_implementation("eager")
    assert torch.equal(expected, sample(SAMPLED, [0, 1, 2]))
    decoder, _, _ = generator_parts(model, vocabulary)
    decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2', expected sdpa or eager"):
        sample(SAMPLED, [0])


@BOTH_SYSTEMS
def test_what_cannot_be_sampled_is_refused(
    model: PreTrainedModel, vocabulary: VisualVocabulary
) -> None:
    boi = vocabulary.begin_of_image
    with pytest.raises(ValueError, match="does not end in BOI"):
        sample_codes(model, [[5, 6]], [3, boi], vocabulary, GREEDY, [0])
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sample_codes(model, [[5, boi], [boi]], [3, boi], vocabulary, GREEDY, [0])
    model.config.caption_dropout = 0
    with pytest.raises(ValueError, match=r"caption_dropout 0.*guidance_scale=1"):
        sample_codes(model, [[5, boi]], [3, boi], vocabulary, GREEDY, [0])


# ---- logits -> codes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
        {"top_k": 1000, "top_p": 0.01},
        {"temperature": 1.7, "min_p": 1.0},
    ],
)
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
    ("options", "message"),
    [
        ({"temperature": -1}, "expected temperature >= 0"),
        ({"top_k": -1}, "expected temperature >= 0"),
        ({"top_p": 0}, "expected temperature >= 0"),
        ({"min_p": 2}, "expected temperature >= 0"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "expected 0 <= guidance_start"),
        ({"guidance_end": 1.1}, "expected 0 <= guidance_start"),
        ({"temperature": float("nan")}, "a temperature between"),
        ({"guidance_scale": 1e30}, "a temperature between"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_next_to_no_temperature_is_greedy(sample: Callable[..., Tensor]) -> None:
    cold = dataclasses.replace(GREEDY, temperature=1e-40)
    assert torch.equal(sample(cold, [0, 1]), sample(GREEDY, [0, 1]))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_have_64_bits(seed: int) -> None:
    assert image_uniforms([2**64 - 1, -(2**63)], 4).shape == (2, 4)
    with pytest.raises(ValueError, match=f"got seed {seed}"):
        image_uniforms([seed], 4)


def test_recommendations_of_older_generators_are_read(model: PreTrainedModel) -> None:
    model.config.sampling = {"guidance_scale": 2.0, "window": 0}
    assert read_sampling(model.config) == SamplingConfig(guidance_scale=2.0)
