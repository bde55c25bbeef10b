"""The arithmetic of a dry run's report."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vqrae.common.checkpoints import count_parameters
from vqrae.common.dry_run import GIB, KNOWN_MODELS, Report, is_here, known_config


def report(**changes: object) -> Report:
    values: dict = {
        "name": "stage 1",
        "samples": "images",
        "parts": [("model", 1000, 900)],
        "seconds": [9.0, 2.0, 4.0],
        "before_bytes": GIB,
        "peak_bytes": 8 * GIB,
        "working_bytes": 3 * GIB,
        "parameters": 100,
        "trained": 100,
        "micro_batch_size": 2,
        "zero": 0,
        "checkpointing": True,
        "max_steps": 10,
        "global_batch_size": 60,
    }
    return Report(**{**values, **changes})


def test_memory_of_model_states() -> None:
    # 16 bytes for each parameter; ZeRO holds an fp32 copy and partitions all but the weights.
    full = report()
    assert [full.state_bytes(zero, 4) for zero in range(4)] == [1600, 1100, 800, 500]
    half = report(half=True)
    assert half.state_bytes(1, 4) == 200 + 200 + 1200 / 4
    # 16 bytes in mixed precision too (ZeRO, 1910.02054, section 3.1), whatever is partitioned.
    assert half.state_bytes(1, 1) == half.state_bytes(3, 1) == 1600
    frozen = report(trained=0, frozen_bytes=7)
    assert [frozen.state_bytes(zero, 4) for zero in range(4)] == [407, 407, 407, 107]
    assert report().memory(0, 4, micro_batch_size=1) == 1600 + 1.5 * GIB


def test_the_report_scales_to_the_full_run() -> None:
    text = report(parameters=GIB, trained=0).text()
    assert "3 steps of 2 images" in text
    assert "10 steps of 60 = 600 images" in text
    assert "15m00s" in text  # 300 micro-batches of 3 s: the first step does not count
    assert "zero=3                     3.5 GiB" in text


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("lmsys/vicuna-7b-v1.5", 6.738),
        ("lmsys/vicuna-13b-v1.5", 13.016),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345),
    ],
)
def test_known_models_have_their_published_sizes(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    assert count_parameters(model)[0] / 1e9 == pytest.approx(billions, abs=5e-4)


def test_what_is_here(tmp_path: Path) -> None:
    assert is_here(str(tmp_path))
    assert not is_here("nobody/has-this")
    with pytest.raises(ValueError, match=r"Did you mean 'Qwen/Qwen3-0\.6B'"):
        known_config("Qwen/Qwen3-0.6")
    assert set(KNOWN_MODELS) > {"runs/llm", "runs/encoder"}
