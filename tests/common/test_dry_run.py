"""The arithmetic of a dry run's report."""

from pathlib import Path

from vqrae.common.dry_run import DryRunReport, is_here
from vqrae.common.memory import GIB, state_bytes


def test_memory_of_model_states() -> None:
    # 100 parameters, all trained: 16 bytes each; ZeRO holds its own fp32 copy and partitions all but the weights.
    assert state_bytes(400, 100, zero=0, gpus=4) == 1600
    assert state_bytes(400, 100, zero=1, gpus=4) == 400 + 400 + 1200 / 4
    assert state_bytes(400, 100, zero=2, gpus=4) == 400 + 1600 / 4
    assert state_bytes(400, 100, zero=3, gpus=4) == 2000 / 4
    assert state_bytes(200, 100, zero=1, gpus=4, gradient_bytes=2) == 200 + 200 + 1200 / 4


def test_the_report_scales_to_the_full_run() -> None:
    report = DryRunReport(
        name="stage 1",
        samples="images",
        parts={"model": (1000, 900)},
        seconds=[9.0, 2.0, 4.0],
        before_bytes=GIB,
        peak_bytes=8 * GIB,
        model_bytes=4 * GIB,
        gpu_bytes={0: 4 * GIB, 1: 2 * GIB},
        micro_batch_size=2,
        activation_checkpointing=True,
        max_steps=10,
        global_batch_size=60,
    )
    assert report.working_bytes == 3 * GIB
    text = report.text()
    assert "3 steps of 2 images" in text
    assert "10 steps of 60 = 600 images" in text
    assert "15m00s" in text  # 300 micro-batches of 3 s: the first step does not count
    assert "zero=1                     5.0 GiB" in text


def test_what_is_here(tmp_path: Path) -> None:
    assert is_here(str(tmp_path))
    assert not is_here("nobody/has-this")
