"""The unified model's `dry_run=N`: steps of the longest sequences (see `vqrae.common.dry_run`).

All tasks but generation are left out, whose sequences hold most targets; the codes are random.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqrae.common.dry_run import Report, rehearse, scratch_folder, trainer_report
from vqrae.generation.dry_run import on_random_codes
from vqrae.mllm.config import MLLMConfig, TaskConfig
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.dry_run import stand_in_llm


def dry_run(config: MLLMConfig, train: Callable[[MLLMConfig], Any]) -> list[Report]:
    """Rehearse a training.

    Args:
        train: the training.
    """
    with scratch_folder(Path(config.output_dir)) as folder:
        short = rehearsal(config, folder)
        tokenizer = VQRAEConfig.from_pretrained(short.tokenizer)
        length = config.max_caption_tokens + tokenizer.grid_size**2 + 3  # BOI, EOI, EOS
        micro = short.optimization.micro_batch_size
        samples = f"sequences of up to {length:,}"
        report = trainer_report("mllm", samples, config.optimization, micro)
        return [rehearse(lambda watch: train(short), report, config.dry_run)]


def rehearsal(config: MLLMConfig, folder: Path) -> MLLMConfig:
    """The configuration of a dry run; `folder` gets what is not on this machine, and the run."""
    return dataclasses.replace(
        config,
        **on_random_codes(config, folder, config.max_caption_tokens),
        llm=stand_in_llm(config.llm, folder / "llm", "a"),
        generation=TaskConfig(data=str(folder / "codes")),
        captioning=TaskConfig(weight=0),
        instructions=TaskConfig(weight=0),
        caption_dropout=0.0,
    )
