"""Sampling with guidance: our sampler vs `transformers.generate`, on a random Qwen3.

Eight images of eight prompts of different lengths, greedy, so that both must find the same codes.
The codes are compared in float32 and the time in bfloat16, where transformers takes the
unconditional log-probabilities in bfloat16 too, which turns near ties around.

The depth head's eight codes of a position: ours keeps keys and values, the reference computes all
codes before each one again, as UniTok's own sampling does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import Row, memory_row, time_row
from vqrae.generation.heads import DepthHead
from vqrae.generation.modeling import VisualVocabulary, build_generator, pad_left
from vqrae.generation.sampling import SamplingConfig, sample_codes

QWEN3_0_6B = {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072}
QWEN3_0_6B |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
PUBLISHED = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=64)
DEPTH_CODES = 8
GREEDY = SamplingConfig(guidance_scale=4.5, temperature=0)


class CodesOnly(LogitsProcessor):
    """Rules out all ids but those of codes."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.rows] = scores[:, self.rows]
        return allowed


def random_generator(
    vocabulary: VisualVocabulary, shape: dict[str, Any], dtype: torch.dtype
) -> Qwen3ForCausalLM:
    """A generator with random weights whose logits differ enough to compare choices."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not in float32 first, which takes twice the memory
    try:
        # With the usual 0.02 every code repeats the last one, and equal codes prove little.
        spread = {"initializer_range": 0.1, "tie_word_embeddings": True}
        model = build_generator(vocabulary, llm_config={**spread, **shape})
    finally:
        torch.set_default_dtype(before)
    model.config.bos_token_id = None
    return model.eval()


def sampler(
    way: str, vocabulary: VisualVocabulary, shape: dict[str, Any], dtype: torch.dtype, batch: int
) -> Callable[[], Tensor]:
    """Greedy codes (B, N), by our sampler (`ours`) or by transformers (`reference`)."""
    model = random_generator(vocabulary, shape, dtype)
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for i in range(batch):
        words = torch.randint(1, vocabulary.offset, (16 + 2 * i,), generator=generator).tolist()
        prompts.append([*words, vocabulary.begin_of_image])
    unconditional = [1, 2, 3, vocabulary.begin_of_image]

    def ours() -> Tensor:
        return sample_codes(model, prompts, unconditional, vocabulary, GREEDY, range(batch))

    def reference() -> Tensor:
        ones = [[1] * len(prompt) for prompt in prompts]
        ids = model.generate(
            torch.tensor(pad_left(prompts, 0)),
            attention_mask=torch.tensor(pad_left(ones, 0)),
            negative_prompt_ids=torch.tensor([unconditional] * batch),
            guidance_scale=GREEDY.guidance_scale,
            logits_processor=LogitsProcessorList([CodesOnly(vocabulary.code_rows)]),
            do_sample=False,
            max_new_tokens=vocabulary.num_codes,
            pad_token_id=0,
        )
        return vocabulary.to_codes(ids[:, -vocabulary.num_codes :])

    return ours if way == "ours" else reference


def depth_sampler(way: str, shape: dict[str, Any], rows: int) -> Callable[[], Tensor]:
    """Greedy codes (R, 8) of one position of a random depth head of three layers, in float32."""
    torch.manual_seed(0)
    config = Qwen3Config(**{"initializer_range": 0.1, **shape}, attn_implementation="sdpa")
    head = DepthHead(config, DEPTH_CODES, codebook_size=4096).eval()
    embedding = head.embedding
    assert embedding is not None, "a head of several codes embeds all but the last"
    hidden_RD = torch.randn(rows, config.hidden_size)
    steps = head.start(rows)

    @torch.inference_mode()
    def ours() -> Tensor:
        return head.sample(hidden_RD, lambda book, logits: logits.argmax(-1), steps)

    @torch.inference_mode()
    def reference() -> Tensor:
        inputs, codes = hidden_RD[:, None], []
        for book in range(DEPTH_CODES):
            states = head.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
            codes.append(head.classifier(states[:, -1]).argmax(-1))
            if book < DEPTH_CODES - 1:
                following = embedding(codes[-1] + book * head.codebook_size)
                inputs = torch.cat([inputs, following[:, None]], dim=1)
        return torch.stack(codes, dim=1)

    return ours if way == "ours" else reference


def run(
    vocabulary: VisualVocabulary = PUBLISHED,
    shape: dict[str, Any] = QWEN3_0_6B,
    batch: int = 8,
    repeats: int = 2,
) -> list[Row]:
    exact, fast = ((vocabulary, shape, dtype, batch) for dtype in (torch.float32, torch.bfloat16))
    same = torch.equal(sampler("ours", *exact)(), sampler("reference", *exact)())
    assert same, "our sampler and transformers.generate find different codes"
    case = f"{batch} images of {vocabulary.num_codes} codes"
    work = sampler("ours", *fast), sampler("reference", *fast)
    rows = [time_row(case, *work, repeats=repeats, work=batch, unit="images/s")]
    del work  # and the models, before other processes make them again
    both = ("ours", *fast), ("reference", *fast)
    rows.append(memory_row(f"{case}, beyond the weights", sampler, *both))
    # With guidance there are two rows for each image.
    depth = [depth_sampler(way, shape, 2 * batch) for way in ("ours", "reference")]
    assert torch.equal(depth[0](), depth[1]()), "cached and uncached depth find different codes"
    name = f"depth head, {DEPTH_CODES} codes of a position"
    return [*rows, time_row(name, *depth, repeats=repeats, work=batch, unit="positions/s")]
