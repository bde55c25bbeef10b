"""LLaVA's stages on the GPU of tests/fake_gpu.py."""

import pytest
from fake_gpu import NoWaiting, fake_gpu

from vqrae.understanding.trainer import LlavaTrainer

WAITS = (
    "common/optim.py",  # Muon asks whether the step is skipped, once a step
    "transformers/masking_utils.py",  # whether a mask hides anything
    "indexed by a mask",  # the logits of trained tokens alone, which are a few of many
)


def test_the_host_waits_for_no_step(launch, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        "batching=packed",
        "sft.optimizer=muon",
        "sft.extra={gradient_checkpointing: true}",
        "pretrain.save_steps=1",
        "pretrain.logging_steps=10",
        "sft.logging_steps=10",
    )
    with fake_gpu() as gpu:
        watch = NoWaiting(gpu, *WAITS)
        watch.follow(LlavaTrainer, monkeypatch)
        launch("run", 2, *options)
        assert watch.steps == 4
