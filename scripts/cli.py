"""The `vqrae` command: a trained model at work on images, questions and prompts.

Heavy imports stay inside the commands, so that `vqrae --help` answers at once.
"""

import argparse
import sys

from vqrae.common.errors import exit_code
from vqrae.scripts.commands import chat, data, generate, graft, images, plan, training

MODULES = (images, chat, generate, data, training, graft, plan)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 when `check-data` found a problem, 2 for a mistake in the call."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: arguments.run(arguments), "vqrae")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqrae",
        description="One visual tokenizer: reconstruct, encode, chat, generate. `vqrae COMMAND --help` lists the options.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in MODULES:
        module.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
