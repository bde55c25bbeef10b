"""Ask about pictures."""

import argparse
import sys
from typing import Any

from vqrae.scripts.commands.shared import add_command, quiet


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(commands, "chat", chat, "ask about pictures", model="understanding model")
    command.add_argument("--image", action="append", default=[], help="a picture; may be given several times")
    command.add_argument("--question", help="ask once; without it, ask interactively")
    command.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")


def chat(arguments: argparse.Namespace) -> None:
    """Answer one question, or talk until the input ends."""
    from vqrae.common.pictures import open_picture
    from vqrae.understanding.chat import Chat

    quiet()
    pictures = [open_picture(path) for path in arguments.image]
    model = Chat.from_pretrained(arguments.model, device=arguments.device, max_new_tokens=arguments.max_new_tokens)
    if arguments.question:
        print(model.answer([(pictures, arguments.question)])[0])
        return
    print("Ask about the picture. `/image FILE` shows another one, an empty line ends.")
    session = model.session()
    while line := _ask():
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                pictures.append(open_picture(rest.strip()))
                continue
            print(session.ask(line, pictures))
            pictures = []  # the session remembers them
        except ValueError as error:
            print(f"vqrae: {error}", file=sys.stderr)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
