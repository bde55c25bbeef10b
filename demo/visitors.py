"""What visitors send, checked before a model sees it, and what they are told."""

import base64
import binascii
import concurrent.futures
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from PIL import Image

from vqrae.common.files import printable
from vqrae.common.images import open_image, stored_size

MAX_BYTES = 10 * 2**20
"""Of all files that are sent at once."""
MAX_PIXELS = 32_000_000
"""Of an image, in its file: those of a camera; decoded, they take 128 MB."""
MAX_IMAGES = 8
"""Of one conversation or one generation."""
MAX_CHARACTERS = 1000
DECODE_SECONDS = 20.0


def read_uploads(files: Any) -> list[Image.Image]:
    """Images from what the page sends: `{"name": TEXT, "size": BYTES, "data": data URL}` each.

    Raises:
        ValueError: for too many or too large files, and for what is not a readable image.
    """
    if not isinstance(files, Sequence) or not all(isinstance(file, Mapping) for file in files):
        raise ValueError("got no files: choose an image")
    if len(files) > MAX_IMAGES:
        raise ValueError(f"got {len(files)} images, expected at most {MAX_IMAGES}")
    return [read_image(decode(file), name=name_of(file)) for file in files]


def name_of(file: Mapping[str, Any]) -> str:
    """What messages call a file: its last part, in print, not too long."""
    name = PurePath(str(file.get("name") or "image")).name
    return printable(name)[-60:] or "image"


def decode(file: Mapping[str, Any]) -> bytes:
    """The bytes of a file, whose data URL the page left out when it was too large."""
    size, data = file.get("size"), file.get("data")
    too_large = isinstance(size, int) and size > MAX_BYTES
    if too_large or (isinstance(data, str) and len(data) > MAX_BYTES * 4 / 3 + 100):
        amount = f"{size / 1e6:.0f} MB" if isinstance(size, int) else "more"
        raise ValueError(
            f"{name_of(file)}: got {amount}, expected at most {MAX_BYTES / 1e6:.0f} MB at once: "
            "choose a smaller file"
        )
    if not isinstance(data, str):
        raise ValueError(f"{name_of(file)}: got no content, expected an image")
    try:
        return base64.b64decode(data.rpartition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name_of(file)}: did not arrive whole: send it again") from error


def read_image(data: bytes, *, name: str) -> Image.Image:
    """An upright RGB image from the bytes of a file of any kind; see `open_image`.

    Raises:
        ValueError: for what is not a readable image, has more than MAX_PIXELS, or takes longer
            than DECODE_SECONDS.
    """
    if not data:
        raise ValueError(f"{name}: got an empty file, expected an image")
    width, height = stored_size(io.BytesIO(data), name=name)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name}: got {width:,} x {height:,} pixels, expected at most "
            f"{MAX_PIXELS // 10**6} million: make it smaller"
        )
    # Not `with`: leaving the block would wait for the decoder that is too slow.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(open_image, io.BytesIO(data), name=name).result(DECODE_SECONDS)
    except concurrent.futures.TimeoutError as error:
        raise ValueError(f"{name}: could not be decoded within {DECODE_SECONDS:g} s") from error
    finally:
        pool.shutdown(wait=False)


def read_text(text: Any, what: str) -> str:
    """A question or prompt without the space around it.

    Raises:
        ValueError: when it is empty, too long, or holds characters that nobody can see.
    """
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise ValueError(f"got an empty {what}: write one")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"got a {what} of {len(text):,} characters, expected at most {MAX_CHARACTERS:,}"
        )
    text = " ".join(text.split())
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Co"):
            code = f"U+{ord(character):04X}"
            raise ValueError(f"got a {what} with the control character {code}: remove it")
    return text


def public(error: BaseException) -> str:
    """An error as one line for a visitor: folders of this machine are left out."""
    line = printable(" ".join(str(error).split())) or type(error).__name__
    return re.sub(r"(?<![\w.:/])(?:[A-Za-z]:)?[\\/](?:[^\s\\/:,;()'\"]+[\\/])+", "", line)
