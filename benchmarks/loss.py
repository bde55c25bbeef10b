"""The generator's loss: a softmax over the codes where codes are predicted, beside the softmax over the whole vocabulary.

At the size of Qwen3-0.6B with one sequence of 1536 tokens, 1024 of them codes. The reference is the loss of transformers, with
logits of all 168,448 rows at every position.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

from vqrae.benchmarks.harness import Row, compare, peak_memory
from vqrae.common.distributed import attention_implementation
from vqrae.common.trainer import IGNORE_INDEX
from vqrae.generation.modeling import VisualHead, build_generator
from vqrae.generation.trainer import visual_loss
from vqrae.generation.vocabulary import VisualVocabulary

VOCABULARY = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=1024)
LENGTH = 1536
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
LAYERS = 2  # of the 28: of the step of a whole model
Way = Literal["ours", "reference"]


class Case:
    """A model with so many layers, one random sequence, and both losses. Without layers only embedding, head and loss are left.

    Computed under bf16 autocast, as in training.
    """

    def __init__(
        self, vocabulary: VisualVocabulary, shape: dict[str, int], length: int, layers: int
    ) -> None:
        torch.manual_seed(0)
        config = {**shape, "num_hidden_layers": layers}
        self.vocabulary = vocabulary
        self.model: Qwen3ForCausalLM = build_generator(
            vocabulary, llm_config=config, attention=attention_implementation()
        )
        self.heads = {
            "reference": self.model.lm_head,
            "ours": VisualHead(self.model.lm_head, vocabulary.code_rows),
        }
        ids = torch.randint(vocabulary.offset, (1, length))
        codes = torch.randint(vocabulary.codebook_size, (1, vocabulary.num_codes))
        ids[:, -vocabulary.num_codes :] = vocabulary.to_ids(codes)
        labels = ids.clone()
        labels[:, : -vocabulary.num_codes] = IGNORE_INDEX
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loss(self, way: Way) -> Tensor:
        """The forward pass."""
        self.model.lm_head = self.heads[way]
        with torch.autocast("cpu", torch.bfloat16):
            if way == "ours":
                return visual_loss(self.model, self.batch, self.vocabulary)
            return self.model(**self.batch, use_cache=False).loss

    def step(self, way: Way) -> None:
        """Forward and backward; nothing stays behind."""
        self.loss(way).backward()
        self.model.zero_grad()

    @torch.no_grad()
    def check(self) -> None:
        """Ours is the full loss whose softmax is restricted to the codes (gradients: tests/generation/test_train.py).

        Raises:
            AssertionError: when it is not.
        """
        ours = self.loss("ours")
        self.model.lm_head = self.heads["reference"]
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(
                **inputs, logits_to_keep=self.vocabulary.num_codes + 1, use_cache=False
            ).logits[0, :-1]
        codes = self.vocabulary.to_codes(self.batch["labels"][0, -self.vocabulary.num_codes :])
        torch.testing.assert_close(
            ours, F.cross_entropy(logits[:, self.vocabulary.code_rows].float(), codes)
        )


def prepare(way: Way, part: str, *case: object) -> Callable[[], object]:
    """The function whose memory is measured: `loss` or `step`."""
    made = Case(*case)  # type: ignore[arg-type]
    return lambda: getattr(made, part)(way)


def run(
    vocabulary: VisualVocabulary = VOCABULARY,
    shape: dict[str, int] = SHAPE,
    length: int = LENGTH,
    layers: int = LAYERS,
    repeats: int = 3,
) -> list[Row]:
    """Seconds and memory of head and loss, and of a model of `layers` layers.

    Raises:
        AssertionError: when the two ways do not give the same.
    """
    rows = []
    for part, name in (
        ("loss", "logits and loss, forward"),
        ("step", "head and loss, forward and backward"),
    ):
        memory = [
            peak_memory(prepare, way, part, vocabulary, shape, length, 0)
            for way in ("ours", "reference")
        ]
        rows.append(Row(f"{name}: peak memory", memory[0], memory[1], unit="MiB"))
    for depth, name in (
        (0, "head and loss, forward and backward"),
        (layers, f"{layers} layers, head and loss"),
    ):
        case = Case(vocabulary, shape, length, depth)
        case.check()
        ours, reference = partial(case.step, "ours"), partial(case.step, "reference")
        seconds = compare(ours, reference, repeats)
        rows.append(Row(name, *seconds, unit="s"))
    return rows
