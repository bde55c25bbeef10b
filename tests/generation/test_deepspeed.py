"""Two processes on CPU (gloo): DDP, DeepSpeed ZeRO-1 and ZeRO-3 compute what one process computes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqrae.common.run import read_metrics
from vqrae.data.code_shards import CodeDataset
from vqrae.generation import train
from vqrae.generation.data import GenerationCollator, TrainingStream
from vqrae.generation.generator import Generator
from vqrae.generation.modeling import VisualHead
from vqrae.generation.train import visual_loss

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


def launch_two_processes(arguments: list[str]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "vqrae.generation.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("zero", [0, 1])
def test_two_processes_take_the_steps_of_one(
    zero: int, train_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*train_arguments, "optimization.max_steps=2"]
    train.main([*arguments, f"output_dir={tmp_path / 'one'}"])
    launch_two_processes(
        [*arguments, f"optimization.zero={zero}", f"output_dir={tmp_path / 'two'}"]
    )
    one, two = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=0.01)  # ZeRO keeps the weights in bf16
    assert Generator.from_pretrained(tmp_path / "two").codes(
        ["a photo of a star"], seeds=[0]
    ).shape == (1, 16)


def test_zero3_computes_the_visual_loss(
    train_arguments: list[str], codes_path: Path, tmp_path: Path
) -> None:
    """ZeRO-3 draws other random weights: at learning rate 0, the saved model must repeat the logged loss and gradient."""
    options = [
        "optimization.max_steps=2",
        "optimization.learning_rate=0.0",
        "model.llm_config.initializer_range=0.5",
    ]
    launch_two_processes(
        [*train_arguments, *options, "optimization.zero=3", f"output_dir={tmp_path}"]
    )
    generator = Generator.from_pretrained(tmp_path)
    model, vocabulary = generator.model, generator.vocabulary
    model.lm_head = VisualHead(model.lm_head, vocabulary.code_rows)
    stream = TrainingStream(CodeDataset(codes_path), 16, caption_dropout=0.1)
    collate = GenerationCollator(generator.encode_prompt, vocabulary)
    for step, logged in enumerate(read_metrics(tmp_path)):
        model.zero_grad()
        loss = visual_loss(
            model, collate([stream[i] for i in range(8 * step, 8 * step + 8)]), vocabulary
        )
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        assert logged["loss"] == pytest.approx(loss.item(), rel=0.02)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=0.05)
        assert abs(loss.item() - math.log(64)) > 0.1  # not the loss of a uniform guess
