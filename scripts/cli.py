"""The `vqrae` command: a trained model at work on images, questions and prompts.

A command is a dataclass with a method `run`. Its module is imported when it is called, so that
`vqrae --help` answers at once.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vqrae.common.config import ConfigError, did_you_mean
from vqrae.common.errors import exit_code

# name: (module of vqrae.scripts.commands, class, summary, bare arguments)
COMMANDS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "reconstruct": ("images", "Reconstruct", "encode images and decode them again; PSNR", ()),
    "encode": ("images", "Encode", "turn images into codes", ()),
    "decode": ("images", "Decode", "turn codes into images", ()),
    "codebook": ("images", "Codebook", "show what each code means, and how it is used", ()),
    "chat": ("chat", "Ask", "ask about images", ()),
    "generate": ("generate", "Generate", "generate images from prompts", ()),
    "demo": ("demo", "Demo", "show a page on which to try all of it", ("model",)),
    "check-data": ("data", "CheckData", "read a whole source before training on it", ("source",)),
    "inspect-batch": ("data", "InspectBatch", "print a training batch", ()),
    "graft": ("models", "Graft", "put a tokenizer's encoder into InternVL3", ()),
    "import-unitok": ("models", "ImportUniTok", "read UniTok's checkpoint", ("file", "out")),
    "publish": ("publish", "Publish", "put a trained model on the hub", ("model", "repo")),
    "plan": ("models", "Plan", "say what a training needs, before it starts", ("config",)),
}


def read(argv: Sequence[str]) -> Any:
    """The command that the arguments describe, ready to run; ConfigError if they describe none."""
    from vqrae.common.cli import parse

    name, *words = argv
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}. {did_you_mean(name, COMMANDS)}")
    module, class_name, _, positional = COMMANDS[name]
    command: Any = getattr(importlib.import_module(f"vqrae.scripts.commands.{module}"), class_name)
    if "overrides" in {field.name for field in fields(command)}:
        # The command is about a configuration, which key=value changes; its own fields are --flags.
        flags: list[str] = []
        for word in words:
            is_override = "=" in word and not word.startswith("-")
            flags += ["--overrides", word] if is_override else [word]
        words = flags
    return parse(command, words, positional=positional, program=f"vqrae {name}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 1 if `check-data` found a problem, 2 for a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print("usage: vqrae COMMAND [--key value | key=value ...]; vqrae COMMAND --help\n")
        for name, (_, _, summary, _) in COMMANDS.items():
            print(f"  {name:<15}{summary}")
        return 0 if arguments else 2
    return exit_code(lambda: read(arguments).run(), "vqrae")


if __name__ == "__main__":
    sys.exit(main())
