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
OPTIONS = [
    f"{stage}.{step}" for stage in ("pretrain", "sft") for step in [*STEPS, "warmup_steps=0"]
]


def test_zero_2_then_zero_3_on_two_processes_and_on(tokenizer_folder, llm_folder, tmp_path):
    parts = [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", *OPTIONS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = ["-m", "vqrae.understanding.train", "tiny", f"output_dir={tmp_path / 'two'}", *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sft_steps in (1, 2):  # the second launch finds pretrain finished and resumes sft
        command = [*launch, *job, "pretrain.zero=2", "sft.zero=3", f"sft.max_steps={sft_steps}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    more = [
        f"output_dir={tmp_path / 'two'}",
        *parts,
        "pretrain.zero=2",
        "sft.zero=3",
        "sft.max_steps=3",
    ]
    with pytest.raises(ValueError, match=r"optimizer states in 2 parts, .* got 1 processes"):
        train.main(["tiny", *more])
    train.main(["tiny", f"output_dir={tmp_path / 'one'}", *parts])
    for stage in ("pretrain", "sft"):
        losses = [
            [row["loss"] for row in read_metrics(tmp_path / run / stage)] for run in ("one", "two")
        ]
        assert losses[1] == pytest.approx(
            losses[0], rel=0.02
        )  # DeepSpeed keeps the weights in bf16
    assert (tmp_path / "two" / "pretrain" / "mm_projector.bin").is_file()
    _, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "two" / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        report
    )
    with safe_open(tmp_path / "two" / "model" / "model.safetensors", framework="pt") as weights:
        assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in weights.keys()  # noqa: SIM118 (no mapping)


BOTH_STAGES = """
import gc, sys, weakref
from vqrae.understanding import train

build, models = train.load_or_build, []

def load_or_build(config, stage):
    print(stage, "finds alive:", sum(model() is not None for model in models), flush=True)
    model, processor = build(config, stage)
    models.append(weakref.ref(model))
    return model, processor

train.load_or_build = load_or_build
train.main(sys.argv[1:])
"""


def test_pretrain_leaves_no_model_behind(tokenizer_folder, llm_folder, tmp_path):
    """DeepSpeed's hooks would keep it, and all its copies of the weights, for the whole of sft."""
    parts = [
        f"tokenizer={tokenizer_folder}",
        f"llm={llm_folder}",
        f"output_dir={tmp_path}",
        *OPTIONS,
    ]
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29573",
    }
    command = [sys.executable, "-c", BOTH_STAGES, "tiny", *parts, "pretrain.zero=2", "sft.zero=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **place}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sft finds alive: 0" in done.stdout
