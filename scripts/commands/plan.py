"""What a training would need, before there is a machine for it."""

import argparse
import math
from typing import Any

from vqrae.scripts.commands.shared import add_command


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(
        commands, "plan", plan, "say what memory a training takes, by GPUs and ZeRO stage"
    )
    command.add_argument(
        "config", help="a shipped YAML such as siglip2_256 or tokenizer/tiny, or a file"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the configuration, such as sft.micro_batch_size=8",
    )
    command.add_argument(
        "--gpus",
        type=int,
        action="append",
        help="may be given several times (default: 1, 2, 4 … 64)",
    )
    command.add_argument(
        "--gpu-memory", type=float, default=80, help="GB of one GPU (default: %(default)s)"
    )


def plan(arguments: argparse.Namespace) -> None:
    """Print parameters, activations, and memory by number of GPUs and ZeRO stage, for each training of a configuration."""
    from vqrae.planning.memory_plan import GPU_COUNTS, render
    from vqrae.planning.memory_plan import plan as plan_memory

    gpus = arguments.gpus or GPU_COUNTS
    if not (min(gpus) >= 1 and 1 <= arguments.gpu_memory < math.inf):
        raise ValueError(
            f"got --gpus {arguments.gpus} --gpu-memory {arguments.gpu_memory:g}, expected positive numbers"
        )
    jobs = plan_memory(arguments.config, arguments.overrides)
    print("\n\n".join(render(job, gpus=gpus, gpu_memory=arguments.gpu_memory) for job in jobs))
