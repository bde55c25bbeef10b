"""The generator's loss: a softmax over the codes vs one over the whole vocabulary.

At the size of Qwen3-0.6B with one sequence of 1536 tokens, 1024 of them codes. The reference is the
loss of transformers, with logits of all 168,448 rows at every position.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, memory_row, time_row
from vqrae.common.distributed import attention_implementation
from vqrae.common.trainer import IGNORE_INDEX
from vqrae.generation.heads import SingleCodeHead
from vqrae.generation.modeling import VisualVocabulary, build_generator
from vqrae.generation.train import visual_loss

VOCABULARY = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=1024)
LENGTH = 1536
SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
SHAPE |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
LAYERS = 2  # of the 28


def losses(
    vocabulary: VisualVocabulary, shape: dict[str, int], length: int, layers: int
) -> tuple[dict[str, Callable[[], Tensor]], list[nn.Parameter]]:
    """Losses of one random sequence, under bf16 autocast as in training, and the parameters.

    `restricted` is what ours must equal: the full logits, cut to the codes. Without layers only
    embedding and head remain.
    """
    torch.manual_seed(0)
    config = {**shape, "num_hidden_layers": layers}
    attention = attention_implementation()
    model = build_generator(vocabulary, llm_config=config, attention=attention)
    full_head, visual_head = model.lm_head, SingleCodeHead(model.lm_head, vocabulary.code_rows)
    ids = torch.randint(vocabulary.offset, (1, length))
    codes = torch.randint(vocabulary.codebook_size, (1, vocabulary.num_codes))
    ids[:, -vocabulary.num_codes :] = vocabulary.to_ids(codes)
    labels = ids.clone()
    labels[:, : -vocabulary.num_codes] = IGNORE_INDEX
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def ours() -> Tensor:
        model.lm_head = visual_head
        prompt = {**inputs, "input_ids": ids[:, : -vocabulary.num_codes], "codes": codes}
        return visual_loss(model, prompt, vocabulary)

    def reference() -> Tensor:
        model.lm_head = full_head
        return model(**inputs, labels=labels, use_cache=False).loss

    @torch.no_grad()
    def restricted() -> Tensor:
        model.lm_head = full_head
        logits = model(**inputs, use_cache=False).logits[0, -vocabulary.num_codes - 1 : -1]
        return F.cross_entropy(logits[:, vocabulary.code_rows].float(), codes[0])

    found = {"ours": ours, "reference": reference, "restricted": restricted}
    found = {name: torch.autocast("cpu", torch.bfloat16)(loss) for name, loss in found.items()}
    # Gradients are returned, not kept on the model: each call allocates them again.
    return found, list(model.parameters())


def prepare(way: str, backward: bool, *case: Any) -> Callable[[], Any]:
    """What is measured: the loss, or its backward pass too."""
    found, parameters = losses(*case)
    loss = found[way]
    return (lambda: torch.autograd.grad(loss(), parameters)) if backward else loss


def run(
    vocabulary: VisualVocabulary = VOCABULARY,
    shape: dict[str, int] = SHAPE,
    length: int = LENGTH,
    layers: int = LAYERS,
    repeats: int = 3,
) -> list[Row]:
    case = (vocabulary, shape, length)
    rows = []
    for name, backward in (("logits and loss, forward", False), ("forward and backward", True)):
        both = ("ours", backward, *case, 0), ("reference", backward, *case, 0)
        rows.append(memory_row(f"{name}: peak memory", prepare, *both))
    for depth, name in ((0, "head and loss"), (layers, f"{layers} layers, head and loss")):
        found, _ = losses(*case, depth)
        with torch.no_grad():
            torch.testing.assert_close(found["ours"](), found["restricted"]())
        work = [prepare(way, True, *case, depth) for way in ("ours", "reference")]
        rows.append(time_row(f"{name}, forward and backward", *work, repeats=repeats))
    return rows
