"""Two CPU processes (gloo): pretrain under ZeRO-2 and sft under ZeRO-3, interrupted and resumed."""

import os
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from vqrae.common.run import read_metrics

pytest.importorskip("deepspeed")

# Both stages, with the count of models that the second one finds alive.
BOTH_STAGES = """
import sys, weakref
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


@pytest.mark.slow
def test_zero_2_then_zero_3_on_two_processes_and_on(launch, tokenizer_folder, llm_folder, tmp_path):
    script, run = tmp_path / "both.py", tmp_path / "two"
    script.write_text(BOTH_STAGES)
    zero = ("pretrain.zero=2", "sft.zero=3")
    steps = {"global_batch_size": 4, "micro_batch_size": 2, "logging_steps": 1, "max_steps": 2}
    steps |= {"lr_scheduler_type": "constant_with_warmup", "optimizer": "adamw"}
    given = [f"{stage}.{k}={v}" for stage in ("pretrain", "sft") for k, v in steps.items()]
    places = [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", f"output_dir={run}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sft_steps in (1, 2):  # the second launch finds pretrain finished and resumes sft
        job = [str(script), "tiny", *places, *given, *zero, f"sft.max_steps={sft_steps}"]
        done = subprocess.run(
            [sys.executable, *torchrun, *job],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        # DeepSpeed's hooks would keep pretrain's model for the whole of sft.
        assert "sft finds alive: 0" in done.stdout
    with pytest.raises(ValueError, match=r"optimizer states in 2 parts, .* got 1 processes"):
        launch("two", 3, *zero)
    launch("one", 2)
    for stage in ("pretrain", "sft"):
        runs = [read_metrics(tmp_path / name / stage) for name in ("one", "two")]
        losses = [[row["loss"] for row in rows] for rows in runs]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)  # DeepSpeed's weights are bf16
    assert (run / "pretrain" / "mm_projector.bin").is_file()
    _, report = LlavaForConditionalGeneration.from_pretrained(
        run / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with safe_open(run / "model" / "model.safetensors", framework="pt") as weights:
        names = weights.keys()
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
