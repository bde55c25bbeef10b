"""What to know of a LLaVA run before it starts: what a batch holds."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vqrae.scripts.commands.shared import add_command, quiet

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from vqrae.understanding.train import TrainConfig


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(
        commands, "inspect-batch", inspect_batch, "print a training batch, trained tokens in colour"
    )
    add_config(command, required=True)
    command.add_argument(
        "--stage", choices=("pretrain", "sft"), default="sft", help="default: %(default)s"
    )
    command.add_argument(
        "--samples", type=int, default=4, help="so many, from the beginning (default: %(default)s)"
    )
    command.add_argument(
        "--no-color",
        action="store_true",
        help="trained tokens in [[ ]] (default unless on a terminal)",
    )


def add_config(command: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Options that name a LLaVA run."""
    text = "a name in understanding/configs or a YAML file, then key=value of it, such as tokenizer=RUN"
    command.add_argument(
        "--config", required=required, nargs="+", metavar=("NAME", "key=value"), help=text
    )


def read_run(arguments: argparse.Namespace) -> "TrainConfig":
    """The configuration that the options name."""
    from vqrae.common.config import load_config, shipped_config
    from vqrae.understanding.train import TrainConfig

    name, *overrides = arguments.config
    return load_config(TrainConfig, shipped_config("vqrae.understanding", name), overrides)


def processor_of(config: "TrainConfig") -> "LlavaProcessor":
    """What that run would encode text and images with; no weights are loaded."""
    from vqrae.understanding.build import load_processor

    return load_processor(
        config.tokenizer,
        config.llm,
        chat_template=config.chat_template,
        aspect_ratio=config.aspect_ratio,
    )


def inspect_batch(arguments: argparse.Namespace) -> None:
    """Print the first samples of a stage as one batch."""
    from vqrae.understanding.inspection import describe_batch
    from vqrae.understanding.train import build_collator, learn_words_of_data, open_data

    quiet()
    if arguments.samples < 1:
        raise ValueError(f"got --samples {arguments.samples}, expected a positive number")
    config = read_run(arguments)
    processor = processor_of(config)
    learn_words_of_data(config, processor.tokenizer)
    dataset = open_data(config, arguments.stage, processor.image_processor.crop_size["height"])
    batch = build_collator(config, arguments.stage, processor)(
        [dataset[i] for i in range(min(arguments.samples, len(dataset)))]
    )
    print(describe_batch(batch, processor, color=sys.stdout.isatty() and not arguments.no_color))
