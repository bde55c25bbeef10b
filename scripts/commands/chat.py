"""Ask about images."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vqrae.scripts.commands.shared import add_command, quiet

if TYPE_CHECKING:
    from vqrae.understanding.chat import Chat

HELP = "Ask about the image. `/image FILE` shows another one, `/new` forgets everything, an empty line ends."


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(commands, "chat", chat, "ask about images", model="understanding model")
    command.add_argument(
        "--image", action="append", default=[], help="an image; may be given several times"
    )
    command.add_argument("--question", help="ask once; without it, ask interactively")
    command.add_argument(
        "--questions",
        metavar="FILE.jsonl",
        help='answer every line: {"question": TEXT, "image": FILE}',
    )
    command.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="where the answers to --questions go; resumes where it ends",
    )
    command.add_argument(
        "--image-folder", help="where the images of --questions lie (default: beside it)"
    )
    command.add_argument(
        "--batch-size", type=int, default=16, help="of --questions (default: %(default)s)"
    )
    command.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)"
    )


def chat(arguments: argparse.Namespace) -> None:
    """Answer one question, a file of them, or talk until the input ends."""
    from vqrae.common.files import printable
    from vqrae.common.images import open_image
    from vqrae.data.word_tokenizer import unknown_words
    from vqrae.understanding.chat import Chat

    if (arguments.questions is None) != (arguments.out is None):
        raise ValueError("--questions and --out belong together: give both, or neither")
    if min(arguments.batch_size, arguments.max_new_tokens) < 1:
        raise ValueError("--batch-size and --max-new-tokens must be positive")
    if arguments.question is not None and not arguments.question.strip():
        raise ValueError("--question: got an empty one, expected text")
    quiet()
    images = [open_image(path) for path in arguments.image]
    model = Chat.from_pretrained(
        arguments.model, device=arguments.device, max_new_tokens=arguments.max_new_tokens
    )
    if arguments.questions:
        _answer_file(model, arguments)
    elif arguments.question is not None:
        if unknown := unknown_words(model.text_tokenizer, arguments.question):
            print(
                printable(f"vqrae: words that the model does not know: {', '.join(unknown)}"),
                file=sys.stderr,
            )
        print(model.answer([(images, arguments.question)])[0])
    else:
        _talk(model, images)


def _answer_file(model: "Chat", arguments: argparse.Namespace) -> None:
    from vqrae.common.checkpoints import local_model
    from vqrae.common.cli import progress_line
    from vqrae.common.files import weights_fingerprint
    from vqrae.understanding.answers import answer_file

    done = answer_file(
        model,
        arguments.questions,
        arguments.out,
        fingerprint=weights_fingerprint(local_model(arguments.model)),
        image_folder=arguments.image_folder,
        batch_size=arguments.batch_size,
        progress=progress_line("chat"),
    )
    before = f" ({done.resumed} from before)" if done.resumed else ""
    broken = f", {done.failed} failed: see their `error`" if done.failed else ""
    print(f"{done.total} answers{before} are in {arguments.out}{broken}")


def _talk(model: "Chat", images: list) -> None:
    from transformers import TextStreamer

    from vqrae.common.files import printable
    from vqrae.common.images import open_image

    print(HELP)
    session = model.session()
    while line := _ask():
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                images.append(open_image(rest.strip()))
            elif command == "/new":
                session, images = model.session(), []
            elif command.startswith("/"):
                raise ValueError(f"unknown command {command}. {HELP}")
            else:
                session.ask(
                    line,
                    images,
                    streamer=TextStreamer(
                        model.text_tokenizer, skip_prompt=True, skip_special_tokens=True
                    ),
                )
                images = []  # the session remembers them
        except ValueError as error:
            print(printable(f"vqrae: {error}"), file=sys.stderr)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
