"""LLaVA's stages and chat on a GPU, of which tests/fake_gpu.py says what it is."""

from pathlib import Path

import pytest
from fake_gpu import NoWaiting, fake_gpu

from vqrae.understanding import train
from vqrae.understanding.trainer import LlavaTrainer

WAITS = (
    "common/optim.py",  # Muon asks whether the step is skipped, once a step
    "transformers/masking_utils.py",  # whether a mask hides anything
    "indexed by a mask",  # the logits of trained tokens alone, which are a few of many
)
STEPS = [
    "global_batch_size=2",
    "micro_batch_size=1",
    "max_steps=3",
    "save_steps=2",
    "logging_steps=10",
]


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("both", ()),
        ("sft", ("batching=packed", "sft.optimizer=muon")),
        ("sft", ("batching=grouped", "sft.extra={gradient_checkpointing: true}")),
    ],
)
def test_the_host_waits_for_no_step(
    stage: str,
    options: tuple[str, ...],
    tokenizer_folder: Path,
    llm_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [f"{name}.{value}" for name in ("pretrain", "sft") for value in STEPS]
    places = [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", f"output_dir={tmp_path}"]
    with fake_gpu() as gpu:
        watch = NoWaiting(gpu, *WAITS)
        watch.follow(LlavaTrainer, monkeypatch)
        train.main(["tiny", *places, *steps, f"stage={stage}", *options])
        assert watch.steps == (6 if stage == "both" else 3)
