"""An answer as it is written, word by word, within a time limit."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from transformers import TextIteratorStreamer

from vqrae.understanding.chat import Session

ENDING = "…"
"""After an answer that the time limit cut."""


def answer(
    session: Session, question: str, images: Sequence[Image.Image], *, seconds: float
) -> Iterator[str]:
    """The answer so far, again and again; the last one is whole. The session remembers the turn.

    Raises:
        ValueError: for a question or a conversation that the model refuses.
    """
    tokenizer = session.chat.text_tokenizer
    options = {"skip_prompt": True, "skip_special_tokens": True}
    streamer = TextIteratorStreamer(tokenizer, **options)
    started = time.monotonic()
    pool = ThreadPoolExecutor(1)
    work = pool.submit(
        session.ask, question, images, sampling={"max_time": seconds}, streamer=streamer
    )
    # A question that is refused writes nothing, and nobody else would end the stream.
    work.add_done_callback(lambda _: streamer.end())
    pool.shutdown(wait=False)
    text = ""
    for piece in streamer:
        text += piece
        yield text
    whole = work.result()
    yield whole + ENDING if time.monotonic() - started > seconds else whole
