"""Train the tokenizer, in two stages (VQRAE section 3.3): first quantizer and decoder on a frozen encoder, then
everything together, with the encoder held by distillation to its frozen original.

    python -m vqrae.tokenizer.train tiny output_dir=runs/tokenizer model.encoder=runs/encoder
    torchrun --standalone --nproc_per_node 2 -m vqrae.tokenizer.train tiny zero=2 ...

    python -m vqrae.tokenizer.train siglip2_256 stage=2 dry_run=1 micro_batch_size=2

Relaunching the same command continues where it stopped.
"""

import shutil
from pathlib import Path

from transformers.trainer_utils import set_seed

from vqrae.common.cli import parse
from vqrae.common.distributed import (
    attention_implementation,
    fit_batch,
    is_main_process,
    world_size,
)
from vqrae.common.errors import run_main
from vqrae.common.files import atomic_path, weights_fingerprint
from vqrae.common.run import RunDirectory, trained_steps
from vqrae.tokenizer.build import build_tokenizer, check_quantizer
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.dry_run import dry_run
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.stage import StageTrainer


def main(argv: list[str] | None = None) -> None:
    config = parse(TokenizerTrainConfig, argv, package="vqrae.tokenizer")
    check_quantizer(config)
    if config.dry_run:
        dry_run(config)
        return
    attention = attention_implementation(config.attention, half=config.bf16)
    output = Path(config.output_dir)
    stages = [1, 2] if config.stage == "both" else [config.stage]
    not_begun = {f"stage{number}" for number in (1, 2) if not (output / f"stage{number}").is_dir()}
    run_of_both = RunDirectory(output, config, seed=config.seed, ignore=not_begun)
    require_same_length(config, output)
    for number in stages:
        stage = config.stage_config(number)
        fit_batch(stage.global_batch_size, stage.micro_batch_size, world_size())
    if not all((output / f"stage{number}" / "model").is_dir() for number in stages):
        run_of_both.begin()
    for number in stages:
        folder, previous = output / f"stage{number}", output / "stage1" / "model"
        if (folder / "model").is_dir():
            print(f"stage {number} is finished: {folder / 'model'}")
            continue
        if number == 2 and not previous.is_dir():
            raise FileNotFoundError(
                f"stage 2 starts from {previous}, which does not exist: run stage=1 first, or stage=both"
            )
        set_seed(config.seed)
        if number == 1:
            model = build_tokenizer(config.model, attention)
        else:
            model = VQRAEModel.from_pretrained(previous, attn_implementation=attention)
        run = RunDirectory(folder, seed=config.seed)
        run.begin()
        StageTrainer(config, number, model, run).train()
    if is_main_process():
        for folder in (output / f"stage{stages[-1]}").glob("model*"):  # and its moving average
            with atomic_path(output / folder.name) as temporary:
                shutil.copytree(folder, temporary)
        print(f"tokenizer {weights_fingerprint(output / 'model')[:16]} in {output / 'model'}")


def require_same_length(config: TokenizerTrainConfig, output: Path) -> None:
    """Refuse to prolong a finished stage: its learning rates have come to their end, and stage 2 starts from stage 1.

    Raises:
        ValueError: naming the steps that it was trained for.
    """
    for number in (1, 2):
        folder, asked = output / f"stage{number}" / "model", config.stage_config(number).max_steps
        if 0 < trained_steps(folder) < asked:
            raise ValueError(
                f"{folder} is finished after {trained_steps(folder)} steps, got stage{number}.max_steps={asked}: "
                f"set stage{number}.max_steps={trained_steps(folder)}, or another output_dir"
            )


if __name__ == "__main__":
    run_main(main)
