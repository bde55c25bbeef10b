"""LLaVA's `dry_run=N`: steps of the longest dialogues (see `vqrae.common.dry_run`)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vqrae.common.distributed import is_main_process
from vqrae.common.dry_run import (
    Report,
    rehearse,
    scratch_folder,
    shorten,
    trainer_report,
)
from vqrae.common.files import write_json
from vqrae.tokenizer.dry_run import stand_in_llm, stand_in_tokenizer

if TYPE_CHECKING:
    from vqrae.understanding.train import TrainConfig


def dry_run(
    config: "TrainConfig", train_stage: Callable[["TrainConfig", Any], Any]
) -> list[Report]:
    """Rehearse the configured stages one after the other.

    Args:
        train_stage: trains one stage of a configuration.
    """
    return [_rehearse_stage(config, stage, train_stage) for stage in config.stages]


def _rehearse_stage(config: "TrainConfig", stage: str, train_stage: Callable) -> Report:
    with scratch_folder(Path(config.output_dir)) as folder:
        short = rehearsal(config, folder)
        micro = getattr(short, stage).micro_batch_size
        samples = f"samples of {config.max_length:,}"
        report = trainer_report(f"understanding, {stage}", samples, getattr(config, stage), micro)
        return rehearse(lambda watch: train_stage(short, stage), report, config.dry_run)


def rehearsal(config: "TrainConfig", folder: Path) -> "TrainConfig":
    """The configuration of a dry run: one micro-batch of every process a step.

    Args:
        folder: where what is not on this machine is put, and the run.
    """
    if is_main_process():
        write_dialogues(folder, config.max_length)
    return dataclasses.replace(
        config,
        tokenizer=stand_in_tokenizer(config.tokenizer, folder / "tokenizer"),
        llm=stand_in_llm(config.llm, folder / "llm", "word"),
        output_dir=str(folder / "run"),
        data=str(folder / "dialogues.json"),
        pretrain_data=None,
        image_folder=None,
        skip_missing=0,
        projector=None,
        pretrain=shorten(config.pretrain, config.dry_run),
        sft=shorten(config.sft, config.dry_run),
        dry_run=0,
    )


def write_dialogues(folder: Path, words: int, size: int = 256) -> None:
    """Dialogues in LLaVA's format: an image, and an answer of this number of words."""
    Image.new("RGB", (64, 64)).save(folder / "image.png")
    turns = [
        {"from": "human", "value": "<image>\nword"},
        {"from": "gpt", "value": "word " * words},
    ]
    record = {"image": "image.png", "conversations": turns}
    write_json(folder / "dialogues.json", [{"id": i, **record} for i in range(size)])
