"""The unified model's `dry_run=N`: steps of the longest sequences (see `vqrae.common.dry_run`).

All tasks but generation are left out, whose sequences hold most targets; the codes are random.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqrae.common.checkpoints import local_model
from vqrae.common.distributed import is_main_process
from vqrae.common.dry_run import (
    Report,
    rehearse,
    scratch_folder,
    shorten,
    trainer_report,
)
from vqrae.generation.dry_run import write_random_codes
from vqrae.mllm.config import MLLMConfig, TaskConfig
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.dry_run import stand_in_llm, stand_in_tokenizer


def dry_run(config: MLLMConfig, train: Callable[[MLLMConfig], Any]) -> list[Report]:
    """Rehearse a training.

    Args:
        train: the training.
    """
    with scratch_folder(Path(config.output_dir)) as folder:
        short = rehearsal(config, folder)
        length = (
            config.max_caption_tokens
            + VQRAEConfig.from_pretrained(short.tokenizer).grid_size ** 2
            + 3
        )
        micro = short.optimization.micro_batch_size
        samples = f"sequences of up to {length:,}"
        report = trainer_report("mllm", samples, config.optimization, micro)
        return [rehearse(lambda watch: train(short), report, config.dry_run)]


def rehearsal(config: MLLMConfig, folder: Path) -> MLLMConfig:
    """The configuration of a dry run: one micro-batch of every process a step, of random codes.

    Args:
        folder: where what is not on this machine is put, and the run.
    """
    tokenizer = local_model(stand_in_tokenizer(config.tokenizer, folder / "tokenizer"))
    optimization = shorten(config.optimization, config.dry_run)
    if is_main_process():
        size = max(64, optimization.global_batch_size)
        write_random_codes(folder / "codes", tokenizer, config.max_caption_tokens, size)
    return dataclasses.replace(
        config,
        tokenizer=str(tokenizer),
        llm=stand_in_llm(config.llm, folder / "llm", "a"),
        output_dir=str(folder / "run"),
        generation=TaskConfig(data=str(folder / "codes")),
        captioning=TaskConfig(weight=0),
        instructions=TaskConfig(weight=0),
        caption_dropout=0.0,
        optimization=optimization,
        previews=0,
        dry_run=0,
    )
