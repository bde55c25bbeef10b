"""A tokenizer's encoder as the eyes of a finished model."""

import argparse
from typing import Any

from vqrae.scripts.commands.shared import add_command, quiet


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(
        commands,
        "graft",
        graft,
        "put a tokenizer's encoder into InternVL3, in place of its vision tower",
    )
    command.add_argument(
        "--model", required=True, help="InternVL3: folder or hub id that ends in -hf"
    )
    command.add_argument(
        "--tokenizer", required=True, help="tokenizer: run directory, model folder or hub id"
    )
    command.add_argument(
        "--out", required=True, help="folder for the new model, which must not exist"
    )


def graft(arguments: argparse.Namespace) -> None:
    """Write the grafted model; plain transformers opens it."""
    from vqrae.understanding.graft import graft as write_graft

    quiet()
    folder = write_graft(arguments.model, arguments.tokenizer, arguments.out)
    print(
        f"{folder}: open it with AutoModelForImageTextToText; manifest.json says what it was made from"
    )
