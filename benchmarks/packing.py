"""Packed sft vs the padded, modality-grouped way of LLaVA-1.5, in real tokens per second.

The mixture has the shape of LLaVA's mix-665k at a size for one CPU core: dialogues of one to eight
questions about images, and text-only dialogues whose lengths spread as ShareGPT's do. Both ways see
every record once and pay for encoding, batching, tower, forward and backward. Only real tokens
count: no padding, no blank image.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.harness import Row, time_row
from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import attention_implementation
from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.conversations import modality_length
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.stream import GroupedSampler
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.build import build_llava
from vqrae.understanding.conversation import ConversationCollator
from vqrae.understanding.packing import PackingCollator
from vqrae.understanding.train import freeze

ENCODER = {"model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 512}
ENCODER |= {"num_hidden_layers": 4, "num_attention_heads": 4, "vision_use_head": False}
ENCODER |= {"image_size": 64, "patch_size": 8}
# Of the text-only dialogues, whose lengths are log-normal.
TEXT_SHARE, MAX_WORDS = 0.25, 700
MEDIAN_WORDS, SPREAD = 120, 1.0


def mixture(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Records of both kinds in random order."""
    rng = np.random.default_rng(seed)
    records = []
    for index in range(count):
        record = SceneDataset(item="conversation", num_questions=int(rng.integers(1, 9)))[index]
        if rng.random() < TEXT_SHARE:
            length = int(np.clip(rng.lognormal(np.log(MEDIAN_WORDS), SPREAD), 8, MAX_WORDS))
            spoken = " ".join(turn["value"] for turn in record["conversations"])
            words = spoken.replace("<image>", "").split()
            text = (words * (length // len(words) + 1))[:length]
            question, answer = " ".join(text[: length // 4]), " ".join(text[length // 4 :])
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            record = {"id": f"text-{index}", "conversations": turns}
        records.append(record)
    return records


def small_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA of the embedded default's size, with random weights."""
    torch.manual_seed(0)
    config = load_config(TinyLLMConfig, shipped_config("vqrae.quickstart", "tiny_llm"))
    llm, text_tokenizer = build_tiny_llm(config)
    tokenizer = VQRAEConfig(encoder_config=ENCODER, codebook_size=64, codebook_dim=32)
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder, "tokenizer"), Path(folder, "llm")
        VQRAEModel(tokenizer).save_pretrained(parts[0])
        llm.save_pretrained(parts[1])
        text_tokenizer.save_pretrained(parts[1])
        model, processor = build_llava(*parts, attention_implementation())
    freeze(model, "sft")
    return model.train(), processor


def run(count: int = 96, micro_batch_size: int = 16, repeats: int = 3) -> list[Row]:
    model, processor = small_llava()
    records = mixture(count)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    one_row = attention_implementation() == "flash_attention_2"
    padded, packed = ConversationCollator(processor), PackingCollator(processor, one_row=one_row)
    lengths = np.array([modality_length(record["conversations"]) for record in records])
    grouped = list(GroupedSampler(lengths, micro_batch_size=micro_batch_size, micro_batches=1))
    shuffled = np.random.default_rng(0).permutation(len(records)).tolist()

    def epoch(collator: ConversationCollator, order: Sequence[int]) -> Callable[[], float]:
        """Forward and backward over all records; returns the summed loss of all trained tokens."""

        def train() -> float:
            total = 0.0
            model.zero_grad()
            for start in range(0, len(order), micro_batch_size):
                batch = collator([records[i] for i in order[start : start + micro_batch_size]])
                for name, value in batch.items():
                    batch[name] = value.to(device) if torch.is_tensor(value) else value
                with torch.autocast(device, torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                total += loss.item() * int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            return total

        return train

    ours, reference = epoch(packed, shuffled), epoch(padded, grouped)
    expected = reference()
    assert abs(ours() - expected) < 1e-3 * expected, "packing changes the loss"
    tokens = sum(int(padded([record])["attention_mask"].sum()) for record in records)
    text_only = int((lengths < 0).sum())
    case = f"sft, {count} records, {text_only} text only, micro-batches of {micro_batch_size}"
    return [time_row(case, ours, reference, repeats=repeats, work=tokens, unit="tokens/s")]
