"""Two CPU processes (gloo): pretrain under ZeRO-2 and sft under ZeRO-3, interrupted and resumed; the folder stays plain."""

import os
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from vqrae.common.run import read_metrics
from vqrae.understanding import train

pytest.importorskip("deepspeed")

STEPS = [
    "global_batch_size=4",
    "micro_batch_size=2",
    "max_steps=2",
    "logging_steps=1",
    "lr_scheduler_type=constant_with_warmup",
]
OPTIONS = [f"{stage}.{step}" for stage in ("pretrain", "sft") for step in [*STEPS, "warmup_steps=0"]]


def test_zero_2_then_zero_3_on_two_processes_and_on(tokenizer_folder, llm_folder, tmp_path):
    parts = [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", *OPTIONS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = ["-m", "vqrae.understanding.train", "tiny", f"output_dir={tmp_path / 'two'}", *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sft_steps in (1, 2):  # the second launch finds pretrain finished and resumes sft
        command = [*launch, *job, "pretrain.zero=2", "sft.zero=3", f"sft.max_steps={sft_steps}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    train.main(["tiny", f"output_dir={tmp_path / 'one'}", *parts])
    for stage in ("pretrain", "sft"):
        losses = [[row["loss"] for row in read_metrics(tmp_path / run / stage)] for run in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)  # DeepSpeed keeps the weights in bf16
    assert (tmp_path / "two" / "pretrain" / "mm_projector.bin").is_file()
    _, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "two" / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with safe_open(tmp_path / "two" / "model" / "model.safetensors", framework="pt") as weights:
        assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in weights.keys()  # noqa: SIM118 (no mapping)
