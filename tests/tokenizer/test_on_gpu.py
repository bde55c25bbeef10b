"""Trainings on a fake GPU (see `fake_gpu`): devices fit, and the host waits for none of the steps.

The published configurations have their true widths here and two layers; VQRAE_FULL_SIZE=1 gives
them all of their layers.
"""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu
from tokenizer_trainings import TINY, read
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from transformers import AutoModel, ViTConfig

from vqrae.common.run import open as open_run
from vqrae.tokenizer import discriminator, perceptual
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.dry_run import rehearsal
from vqrae.tokenizer.engine import allow_tf32
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.train import train_stage

FULL_SIZE = bool(os.environ.get("VQRAE_FULL_SIZE"))
MUON = "common/optim.py"  # asks whether the step is skipped, once a step
SEARCH = "quantizers/search.py"  # in bf16 lists candidates


def start(
    config: TokenizerTrainConfig, number: int, folder: Path
) -> tuple[VQRAEModel, Iterator[int]]:
    """A tokenizer with weights that never were on the host, and the loop that trains it, set up."""
    with torch.device("cuda"):
        model = build_tokenizer(dataclasses.replace(config.model, encoder=None), "sdpa")
    steps = train_stage(config, number, model, open_run(folder))
    next(steps)
    return model, steps


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for few layers of full width, and a ConvNeXt-S with one block of each width."""
    if FULL_SIZE:
        return []
    widths = [96, 192, 384, 768]
    blocks = [CNBlockConfig(a, b, 1) for a, b in zip(widths, [*widths[1:], None], strict=True)]
    monkeypatch.setattr(perceptual, "convnext_small", lambda: ConvNeXt(blocks))
    return ["model.encoder_config.num_hidden_layers=2"]


@pytest.mark.parametrize("name", ["siglip2_256", "internvit_448"])
def test_the_host_waits_for_no_step_of_a_published_training(
    name: str, shallow: list[str], tmp_path: Path
) -> None:
    config = rehearsal(read(name, "dry_run=2", "ema_decay=0.999", *shallow), 2)
    config = dataclasses.replace(config, log_steps=2, save_steps=9, sample_steps=2)
    with fake_gpu() as gpu:
        model, steps = start(config, 2, tmp_path)
        with gpu.no_waiting():
            next(steps)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is None for p in trained)
        tensors = (*model.parameters(), *model.buffers())
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert next(steps) == 2  # logged and previewed


class Products(TorchDispatchMode):
    """By shape of its result, what every fp32 matrix product may lose."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: dict[tuple[int, ...], set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        if func in products and result.dtype == torch.float32:
            precision = torch.backends.cuda.matmul.fp32_precision
            self.precisions[tuple(result.shape)].add(precision)
        return result


@pytest.mark.parametrize(("switch", "precision"), [("tf32=true", "tf32"), ("tf32=false", "ieee")])
def test_fp32_products_are_tf32_but_for_the_search(
    switch: str, precision: str, tmp_path: Path
) -> None:
    one_image = ["stage2.global_batch_size=1", "stage2.micro_batch_size=1", "stage2.bypass_steps=0"]
    config = read(*TINY, "model.codebook_size=48", *one_image, switch)
    try:
        with fake_gpu():
            _, steps = start(config, 2, tmp_path)
            with Products() as products:
                next(steps)
    finally:
        allow_tf32(False)
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's own start
    # Scores of 64 features with 48 codes, and W(C).
    assert products.precisions.pop((64, 48)) == products.precisions.pop((48, 32)) == {"ieee"}
    assert set.union(*products.precisions.values()) == {precision}


SEARCH_BF16 = "model.quantizer_options={search: bf16, train_codebook: true}"
ADAMW = ("ema_decay=0.9", "stage2.optimizer=adamw", "activation_checkpointing=true")
PIXELS = ("stage2.revival_interval=3", "stage2.bypass_steps=1")
DINO = (
    "model.quantizer=ibq",
    "model.quantizer_options={}",
    "stage2.entropy_weight=0.05",
    "stage2.perceptual_weight=0.1",
    "stage2.adversarial_weight=0.1",
    "stage2.discriminator_lr=1e-4",
    "stage2.discriminator=dino",
)


EMA = ("model.quantizer=ema_vq", "model.quantizer_options={}")
MCQ = (
    "model.quantizer=mcq",
    "model.quantizer_options={}",
    "model.num_codebooks=4",
    "stage2.revival_interval=3",
)


@pytest.mark.parametrize("options", [PIXELS, (SEARCH_BF16, *ADAMW), EMA, DINO, MCQ])
def test_a_stage_runs_saves_and_resumes(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    vit = AutoModel.from_config(ViTConfig(**sizes, intermediate_size=24), add_pooling_layer=False)
    monkeypatch.setattr(discriminator, "random_vit", lambda: vit)
    config = read(
        *TINY,
        "random_perceptual_weights=true",
        *("log_steps=3", "save_steps=3", "sample_steps=3"),
        *("stage2.global_batch_size=2", "stage2.micro_batch_size=2"),
        *("stage2.revival_interval=0", "stage2.bypass_steps=0"),
        *options,
    )
    waits = (MUON, SEARCH) if SEARCH_BF16 in options else (MUON,)
    with fake_gpu() as gpu:
        _, steps = start(config, 2, tmp_path)
        for step in range(3):
            # The second step may start a codebook; the third moves codes, logs, saves and previews.
            if step == 0 or (step == 1 and not config.stage2.bypass_steps):
                with gpu.no_waiting(*waits):
                    next(steps)
            else:
                next(steps)
        run = open_run(tmp_path)
        assert [folder.name for folder in run.checkpoints()] == ["step-3"]
        _, resumed = start(config, 2, tmp_path)
        with gpu.no_waiting(*waits):
            assert next(resumed) == 4
