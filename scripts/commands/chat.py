"""Ask an understanding model about images."""

import sys
from dataclasses import dataclass

from PIL import Image
from transformers import TextStreamer
from transformers.utils import logging

from vqrae.common.checkpoints import local_model
from vqrae.common.cli import progress_line
from vqrae.common.config import check_range
from vqrae.common.files import printable, weights_fingerprint
from vqrae.common.images import open_image
from vqrae.data.word_tokenizer import unknown_words
from vqrae.mllm.inference import open_chat
from vqrae.understanding.chat import Chat, answer_file

HELP = "`/image FILE` shows another image, `/new` forgets everything, an empty line ends."


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask about images: one question, a file of questions, or interactively."""

    model: str
    """Understanding model: run directory, model folder or hub id."""
    image: tuple[str, ...] = ()
    """An image; may be given several times."""
    question: str | None = None
    """Ask once; without it, ask interactively."""
    questions: str | None = None
    """FILE.jsonl whose lines are answered: {"question": TEXT, "image": FILE}"""
    out: str | None = None
    """FILE.jsonl for the answers to `questions`; the same command continues it."""
    image_folder: str | None = None
    """Where the images of `questions` are, if not next to it."""
    batch_size: int = 16
    """Questions of a file that are answered at once."""
    max_new_tokens: int = 128
    """Longest answer."""
    device: str | None = None
    """cpu, cuda, ...; by default CUDA if torch sees a GPU."""

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "max_new_tokens", low=1)
        if (self.questions is None) != (self.out is None):
            raise ValueError("questions and out belong together: give both, or neither")
        if self.question is not None and not self.question.strip():
            raise ValueError("question: got an empty one, expected text")

    def run(self) -> None:
        logging.disable_progress_bar()
        images = [open_image(path) for path in self.image]
        tokens = self.max_new_tokens
        chat = open_chat(self.model, device=self.device, max_new_tokens=tokens)
        if self.questions and self.out:
            self.answer(chat, self.questions, self.out)
        elif self.question is not None:
            if unknown := unknown_words(chat.text_tokenizer, self.question):
                note = f"vqrae: words that the model does not know: {', '.join(unknown)}"
                print(printable(note), file=sys.stderr)
            print(chat.answer([(images, self.question)])[0])
        else:
            talk(chat, images)

    def answer(self, chat: Chat, questions: str, out: str) -> None:
        """Answer a file."""
        done = answer_file(
            chat,
            questions,
            out,
            fingerprint=weights_fingerprint(local_model(self.model)),
            image_folder=self.image_folder,
            batch_size=self.batch_size,
            progress=progress_line("chat"),
        )
        before = f" ({done.resumed} from before)" if done.resumed else ""
        failed = f", {done.failed} failed: see their `error`" if done.failed else ""
        print(f"{done.total} answers{before} are in {out}{failed}")


def talk(chat: Chat, images: list[Image.Image]) -> None:
    """Answer questions from the terminal until an empty line or the end of the input."""
    print(f"Ask about the image. {HELP}")
    session = chat.session()
    while line := read_line():
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                images.append(open_image(rest.strip()))
            elif command == "/new":
                session, images = chat.session(), []
            elif command.startswith("/"):
                raise ValueError(f"unknown command {command}. {HELP}")
            else:
                options = {"skip_prompt": True, "skip_special_tokens": True}
                streamer = TextStreamer(chat.text_tokenizer, **options)
                session.ask(line, images, streamer=streamer)
                images = []  # the session remembers them
        except ValueError as error:
            print(printable(f"vqrae: {error}"), file=sys.stderr)


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
