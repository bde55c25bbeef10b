"""Two CPU processes (gloo): pretrain under ZeRO-2 and sft under ZeRO-3, interrupted and resumed."""

import processes
import pytest
import torch
from llava_trainings import STEPS, train_and_count_models
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from vqrae.common.run import read_metrics

pytest.importorskip("deepspeed")


@pytest.mark.slow
def test_zero_2_then_zero_3_on_two_processes_and_on(launch, tokenizer_folder, llm_folder, tmp_path):
    run, zero = tmp_path / "two", ("pretrain.zero=2", "sft.zero=3", "features=quantized")
    steps = {**STEPS, "max_steps": 2}
    given = [f"{stage}.{k}={v}" for stage in ("pretrain", "sft") for k, v in steps.items()]
    given += [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", f"output_dir={run}", *zero]
    for sft_steps in (1, 2):  # the second launch finds pretrain finished and resumes sft
        job = ["tiny", *given, f"sft.max_steps={sft_steps}"]
        function = train_and_count_models.__name__
        printed = processes.launch("llava_trainings", job, processes=2, function=function)
        # DeepSpeed's hooks would keep pretrain's model for the whole of sft.
        assert "sft finds alive: 0" in printed
    with pytest.raises(ValueError, match=r"optimizer states in 2 parts, .* got 1 processes"):
        launch("two", 3, *zero)
    launch("one", 2, "features=quantized")
    for stage in ("pretrain", "sft"):
        runs = [read_metrics(tmp_path / name / stage) for name in ("one", "two")]
        losses = [[row["loss"] for row in rows] for rows in runs]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)  # DeepSpeed's weights are bf16
    assert (run / "pretrain" / "mm_projector.bin").is_file()
    _, report = LlavaForConditionalGeneration.from_pretrained(
        run / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = load_file(run / "model" / "model.safetensors")
    assert "vision_tower.encoder.vision_model.embeddings.patch_embedding.weight" in weights
    # What chooses codes is neither cut nor cast.
    original = load_file(tokenizer_folder / "model.safetensors")["quantizer.codebook"]
    assert torch.equal(weights["vision_tower.quantizer.codebook"], original)
