"""Drawing images with guidance: our sampler beside `transformers.generate`, on a Qwen3 with random weights.

Eight images of eight prompts of different lengths, greedy, so that both have to find the same tokens. The tokens are compared
in float32 and the time in bfloat16, where transformers takes the unconditional logarithms in bfloat16 too and so turns near
ties around.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.generation import LogitsProcessor, LogitsProcessorList

from vqrae.benchmarks.harness import Row, compare, peak_memory
from vqrae.generation.prepacking import prepacked_linears
from vqrae.generation.sampling import SamplingConfig, sample_codes
from vqrae.generation.vocabulary import VisualVocabulary, pad_left

QWEN3_0_6B = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.1,  # with the usual 0.02 every code repeats the last one, and equal tokens prove little
}
PUBLISHED = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=64)
GREEDY = SamplingConfig(guidance_scale=4.5, temperature=0)


class _CodesOnly(LogitsProcessor):
    def __init__(self, vocabulary: VisualVocabulary) -> None:
        self.rows = vocabulary.code_rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.rows] = scores[:, self.rows]
        return allowed


def transformers_codes(
    model: Qwen3ForCausalLM,
    prompts: list[list[int]],
    unconditional: list[int],
    vocabulary: VisualVocabulary,
    guidance_scale: float,
) -> Tensor:
    """Greedy codes (B, N) by the guidance of transformers itself: a second forward pass with a cache of its own."""
    ids = model.generate(
        torch.tensor(pad_left(prompts, 0)),
        attention_mask=torch.tensor(pad_left([[1] * len(prompt) for prompt in prompts], 0)),
        negative_prompt_ids=torch.tensor([unconditional] * len(prompts)),
        guidance_scale=guidance_scale,
        logits_processor=LogitsProcessorList([_CodesOnly(vocabulary)]),
        do_sample=False,
        max_new_tokens=vocabulary.num_codes,
        pad_token_id=0,
    )
    return vocabulary.to_codes(ids[:, -vocabulary.num_codes :])


def random_generator(
    vocabulary: VisualVocabulary, shape: dict[str, Any], dtype: torch.dtype
) -> Qwen3ForCausalLM:
    """A generator with random weights whose logits differ enough to be told apart."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **shape, vocab_size=vocabulary.num_rows, tie_word_embeddings=True, pad_token_id=None
    )
    config.bos_token_id = config.eos_token_id = None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not in float32 first, which takes twice the memory
    try:
        return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)


def samplers(
    vocabulary: VisualVocabulary, shape: dict[str, Any], dtype: torch.dtype, batch_size: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(ours, that of transformers) on the same model and prompts."""
    model = random_generator(vocabulary, shape, dtype)
    generator = torch.Generator().manual_seed(0)
    boi = vocabulary.begin_of_image
    prompts = [
        [*torch.randint(1, vocabulary.offset, (16 + 2 * i,), generator=generator).tolist(), boi]
        for i in range(batch_size)
    ]
    unconditional = [1, 2, 3, boi]

    def ours() -> Tensor:
        with prepacked_linears(model.model):  # as `Generator` does
            return sample_codes(
                model, prompts, unconditional, vocabulary, GREEDY, range(batch_size)
            )

    return (
        ours,
        lambda: transformers_codes(
            model, prompts, unconditional, vocabulary, GREEDY.guidance_scale
        ),
    )


def prepare(which: int, *arguments: Any) -> Callable[[], Tensor]:
    """One of the two samplers, in a process of its own."""
    return samplers(*arguments)[which]


def run(
    vocabulary: VisualVocabulary = PUBLISHED,
    shape: dict[str, Any] = QWEN3_0_6B,
    batch_size: int = 8,
    repeats: int = 2,
) -> list[Row]:
    """Images per second in bfloat16, and the memory beyond the weights.

    Raises:
        AssertionError: when the two find different tokens in float32.
    """
    ours, reference = samplers(vocabulary, shape, torch.float32, batch_size)
    assert torch.equal(ours(), reference()), (
        "our sampler and transformers.generate find different tokens"
    )
    case = f"{batch_size} images of {vocabulary.num_codes} codes"
    ours, reference = samplers(vocabulary, shape, torch.bfloat16, batch_size)
    seconds, other_seconds = compare(ours, reference, repeats)
    del ours, reference  # and the model, before two processes make it again
    mebibytes, other_mebibytes = (
        peak_memory(prepare, which, vocabulary, shape, torch.bfloat16, batch_size)
        for which in range(2)
    )
    return [
        Row(
            case,
            batch_size / seconds,
            batch_size / other_seconds,
            unit="images/s",
            higher_is_better=True,
        ),
        Row(f"{case}, beyond the weights", mebibytes, other_mebibytes, unit="MiB"),
    ]
