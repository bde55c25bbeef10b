"""Trainings of a tiny tokenizer for tests. As a script: `BAD_STEP ARGUMENTS…`, -1 for none."""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vqrae.common.config import load_config, shipped_config
from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.data import StageImages
from vqrae.tokenizer.modeling import VQRAEModel

ENCODER = (
    "{model_type: siglip_vision_model, hidden_size: 32, intermediate_size: 64, image_size: 64,"
    " num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, vision_use_head: false}"
)
TINY = [
    "tiny",
    "model.encoder=",
    f"model.encoder_config={ENCODER}",
    "model.codebook_size=64",
    "model.codebook_dim=32",
]
# A discriminator from the second step of stage 2 on.
ADVERSARIAL = [
    "stage2.adversarial_weight=0.1",
    "stage2.discriminator_lr=1e-3",
    "stage2.discriminator_start=1",
    "stage2.discriminator_channels=[8, 16, 16]",
]
SHAPE = ("max_steps=4", "global_batch_size=8", "micro_batch_size=4", "warmup_steps=1")
EVERYTHING = [
    *TINY,
    "log_steps=1",
    "save_steps=2",
    "ema_decay=0.5",
    *(f"stage1.{pair}" for pair in (*SHAPE, "revival_interval=1")),
    *(f"stage2.{pair}" for pair in (*SHAPE, "revival_interval=1", "bypass_steps=1")),
    "stage2.perceptual_weight=0.1",
    "stage2.distillation_weight=1.0",
    *ADVERSARIAL,
]
# Settings of which the number of processes is independent. Muon is not among them: it gives the
# smallest directions of a gradient, which are rounding, full weight.
ANY_PROCESSES = [
    "bf16=false",
    "stage1.optimizer=adamw",
    "stage2.optimizer=adamw",
    "data.random_flip=true",
    "data.cutmix=0.7",
    "stage1.max_steps=2",
    "stage2.max_steps=5",
    "stage1.revival_interval=0",
    "stage2.revival_interval=0",
    "stage2.bypass_steps=0",
]
SHORT = ["stage=1", "stage1.max_steps=3", "stage1.revival_interval=0"]
Weights = dict[str, Tensor]


def train(output: Path, *more: str) -> Weights:
    """Train with everything in this process; the weights of the result."""
    tokenizer_train.main([*EVERYTHING, f"output_dir={output}", *more])
    return weights(output / "model")


def launch(output: Path, *more: str, processes: int = 2, bad_step: int = -1) -> Weights:
    """Train with everything in processes of their own; the weights of the result.

    Also for one process: what other tests have set in this one would change its rounding.
    """
    arguments = [str(bad_step), *EVERYTHING, f"output_dir={output}", *more]
    run_script(__file__, *arguments, processes=processes)
    return weights(output / "model")


def run_script(script: str, *arguments: str, processes: int) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def weights(folder: Path) -> Weights:
    return VQRAEModel.from_pretrained(folder).state_dict()


def equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def distance(found: Weights, expected: Weights) -> float:
    """Of all weights together, relative to their norm."""
    error = sum((found[key] - value).square().sum() for key, value in expected.items())
    norm = sum(value.square().sum() for value in expected.values())
    return float(error / norm) ** 0.5


def metrics(output: Path, stage: int) -> list[dict[str, Any]]:
    """Rows of a stage, without its speed."""
    lines = (output / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["images_per_second"]
    return rows


def read(name: str, *overrides: str) -> TokenizerTrainConfig:
    return load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name), overrides)


def bad_images(steps: Collection[int]) -> AbstractContextManager:
    """A block in which the images of some steps are NaN."""
    micro_batches = StageImages.micro_batches

    def spoil(images: StageImages, start: int) -> Iterator[Tensor]:
        stage = images.stage
        per_step = stage.global_batch_size // stage.micro_batch_size // images.world_size
        for i, batch in enumerate(micro_batches(images, start)):
            yield batch * float("nan") if start + i // per_step in steps else batch

    return mock.patch.object(StageImages, "micro_batches", spoil)


if __name__ == "__main__":
    with bad_images({int(sys.argv[1])}):
        tokenizer_train.main(sys.argv[2:])
