"""Trainings of a tiny tokenizer for tests, in this process or in others."""

import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import processes
import torch
from torch import Tensor, nn

from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import is_main_process, sum_over_processes, world_size
from vqrae.common.files import write_json
from vqrae.common.lean import make_lean
from vqrae.tokenizer import train as tokenizer_train
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.data import Batch, StageImages
from vqrae.tokenizer.discriminator import PatchDiscriminator
from vqrae.tokenizer.engine import build_accelerators, build_optimizer, prepare
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
    "stage2.alignment_weight=0.1",
    "stage2.alignment_layers=[0, -1]",
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
# UniTok with everything, in one stage; its discriminator starts in the second step.
UNITOK = [
    "unitok_tiny",
    "model.encoder_config.hidden_size=32",
    "model.encoder_config.num_hidden_layers=2",
    "model.encoder_config.num_attention_heads=2",
    "model.encoder_config.stem_widths=[8, 16]",
    "model.codebook_size=16",
    "model.codebook_dim=32",
    "model.num_codebooks=4",
    "model.decoder=conv",
    "model.output_basis=pixels",
    "model.text_config.hidden_size=32",
    "model.text_config.num_attention_heads=2",
    "log_steps=1",
    "save_steps=2",
    "bf16=false",
    "stage1.optimizer=adamw",
    *(f"stage1.{pair}" for pair in SHAPE),
    "stage1.l1_weight=0.4",
    "stage1.adversarial_weight=0.4",
    "stage1.adaptive_weight=[0.015, 1e4]",
    "stage1.discriminator=dinov2",
    "stage1.discriminator_start=1",
    "stage1.discriminator_lr=1e-3",
    "stage1.discriminator_weight=2",
    "stage1.discriminator_augment=true",
    "stage1.discriminator_blur_steps=2",
    "stage1.consistency_weight=4",
    "stage1.lecam_weight=0",
]
# A small one of the architecture that UniTok's discriminator looks through.
DINOV2 = {"hidden_size": 128, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
Weights = dict[str, Tensor]


def filled(module: nn.Module) -> Any:
    """A module whose weights its names decide: gains of about 1, other values of about 0.1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            is_gain = ("norm" in name and name.endswith("weight")) or "lambda" in name
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + is_gain)
    return module.eval()


def random_images(count: int, size: int) -> Tensor:
    """Random images (count, 3, size, size) in [0, 1], the same everywhere."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def train(output: Path, *more: str, system: Sequence[str] = EVERYTHING) -> Weights:
    """Train with everything in this process; the weights of the result."""
    tokenizer_train.main([*system, f"output_dir={output}", *more])
    return weights(output / "model")


def launch(
    output: Path,
    *more: str,
    count: int = 2,
    bad_step: int = -1,
    system: Sequence[str] = EVERYTHING,
) -> Weights:
    """Train with everything in processes of their own; the weights of the result."""
    arguments = [str(bad_step), *system, f"output_dir={output}", *more]
    processes.launch(__name__, arguments, processes=count, function="train_badly")
    return weights(output / "model")


def train_badly(arguments: list[str]) -> None:
    """With NaN images in the step of the first argument; -1 for none."""
    step, *words = arguments
    with bad_images({int(step)}), quick_statistics():
        tokenizer_train.main(words)


def quick_statistics() -> AbstractContextManager:
    """A block in which trainings start from the statistics of 32 images."""
    return mock.patch.object(tokenizer_train, "sample_size", return_value=32)


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


def of_whole_batches(row: dict[str, Any]) -> dict[str, Any]:
    """A line of the log without what it says of one micro-batch (`vqrae.tokenizer.codebook`)."""
    sampled = ("spread", "rank", "code_offset", "code_error")
    return {name: value for name, value in row.items() if not name.endswith(sampled)}


def read(name: str, *overrides: str) -> TokenizerTrainConfig:
    return load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name), overrides)


def bad_images(steps: Collection[int]) -> AbstractContextManager:
    """A block in which the images of some steps are NaN."""
    micro_batches = StageImages.micro_batches

    def spoil(images: StageImages, start: int) -> Iterator[Batch]:
        stage = images.stage
        per_step = stage.global_batch_size // stage.micro_batch_size // images.world_size
        for i, batch in enumerate(micro_batches(images, start)):
            is_bad = start + i // per_step in steps
            yield batch._replace(images=batch.images * float("nan")) if is_bad else batch

    return mock.patch.object(StageImages, "micro_batches", spoil)


# ---- gradients under ZeRO


def compare_gradients(arguments: list[str]) -> None:
    """Write how far gradients that ZeRO sums over processes under bf16 are from their fp32 mean."""
    from deepspeed.utils import safe_get_full_grad

    stage = read("tiny", "stage2.max_grad_norm=0").stage2
    engine, d_engine = build_accelerators(stage, zero=2, accumulation=1, bf16=True)
    torch.manual_seed(0)
    model = build_tokenizer(read(*TINY).model, "eager")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(engine.process_index))
    distances: dict[str, float] = {}

    def compare(name: str, module: nn.Module, accelerator: Any, loss: Any) -> None:
        make_lean(module)  # as `prepare` does, which rounds otherwise
        loss(module).backward()
        parameters = dict(module.named_parameters())
        trained = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
        module.zero_grad()
        optimizer = build_optimizer({name: (module, 1e-3)}, stage)
        wrapped, optimizer = prepare(accelerator, name, module, optimizer)
        accelerator.deepspeed_engine_wrapped.engine.backward(loss(wrapped))
        for key, gradient in trained.items():
            expected = sum_over_processes(gradient) / world_size()
            error = (safe_get_full_grad(parameters[key]) - expected).norm()
            distances[f"{name}.{key}"] = float(error / expected.norm().clamp(min=1e-12))

    def tokenizer_loss(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = module(images)
        return (output.reconstruction - images).square().mean() + sum(output.losses.values())

    compare("tokenizer", model.train(), engine, tokenizer_loss)
    discriminator = PatchDiscriminator((8, 16))
    compare("discriminator", discriminator, d_engine, lambda module: module(images).square().mean())
    if is_main_process():
        write_json(arguments[0], distances)
