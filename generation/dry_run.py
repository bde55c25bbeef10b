"""The generator's `dry_run=N`: steps of the longest sequences (see `vqrae.common.dry_run`).

The codes are random; the global batch is one micro-batch of every process, on CPU one sequence.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.checkpoints import local_model
from vqrae.common.distributed import is_main_process
from vqrae.common.dry_run import (
    Report,
    is_here,
    known_config,
    rehearse,
    scratch_folder,
    shorten,
    trainer_report,
)
from vqrae.common.files import weights_fingerprint
from vqrae.data.code_shards import CodeManifest, CodeWriter
from vqrae.generation.config import GeneratorModelConfig, TrainingConfig
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.dry_run import stand_in_tokenizer


def dry_run(config: TrainingConfig, train: Callable[[TrainingConfig], Any]) -> list[Report]:
    """Rehearse a training.

    Args:
        train: the training.
    """
    with scratch_folder(Path(config.output_dir)) as folder:
        short = rehearsal(config, folder)
        tokenizer = VQRAEConfig.from_pretrained(short.tokenizer)
        room = config.model.max_caption_tokens + tokenizer.grid_size**2
        length = min(config.model.max_length, room)
        report = trainer_report(
            "generation",
            f"sequences of up to {length:,}",
            config.optimization,
            short.optimization.micro_batch_size,
        )
        return [rehearse(lambda watch: train(short), report, config.dry_run)]


def rehearsal(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """The configuration of a dry run; `folder` gets what is not on this machine, and the run."""
    return dataclasses.replace(
        config,
        **on_random_codes(config, folder, config.model.max_caption_tokens),
        data=str(folder / "codes"),
        model=without_download(config.model),
    )


def on_random_codes(config: Any, folder: Path, caption_tokens: int) -> dict[str, Any]:
    """What a dry run on codes replaces in a configuration: one micro-batch of every process a step.

    The random codes are written to `folder / "codes"`.
    """
    tokenizer = local_model(stand_in_tokenizer(config.tokenizer, folder / "tokenizer"))
    optimization = shorten(config.optimization, config.dry_run)
    if is_main_process():
        size = max(64, optimization.global_batch_size)
        write_random_codes(folder / "codes", tokenizer, caption_tokens, size)
    return {
        "tokenizer": str(tokenizer),
        "output_dir": str(folder / "run"),
        "optimization": optimization,
        "previews": 0,
        "dry_run": 0,
    }


def without_download(model: GeneratorModelConfig) -> GeneratorModelConfig:
    """The same model with random weights and a vocabulary of words, where it is not here.

    Raises:
        ValueError: when its configuration is not known either.
    """
    model = dataclasses.replace(model, caption_dropout=0.0, embedding_init="random")
    if model.llm is None or is_here(model.llm):
        return model
    values = model.llm_config
    if values is None:
        found = known_config(model.llm).to_diff_dict()
        left_out = ("vocab_size", "model_type", "dtype", "transformers_version")
        values = {key: value for key, value in found.items() if key not in left_out}
    return dataclasses.replace(model, llm=None, llm_config=values)


def write_random_codes(folder: Path, tokenizer: Path, caption_tokens: int, size: int) -> None:
    """A code set of random codes, each with a caption of this number of words."""
    config = VQRAEConfig.from_pretrained(tokenizer)
    manifest = CodeManifest(
        tokenizer_fingerprint=weights_fingerprint(tokenizer),
        codebook_size=config.codebook_size,
        num_codebooks=config.num_codebooks,
        grid_size=config.grid_size,
        source="random",
        num_images=size,
        shard_size=size,
    )
    shape = (size, *config.code_shape)
    codes = np.random.default_rng(0).integers(config.codebook_size, size=shape)
    CodeWriter(folder, manifest).write(0, codes, [["a " * caption_tokens]] * size)
