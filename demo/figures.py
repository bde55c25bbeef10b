"""Pieces of the page as HTML. Images are in it, so that no file is written or served.

Shapes: N patches of an image, n codebooks. Codes are (N,) of one codebook, (N, n) of several.
"""

import html
import math
import re
from collections.abc import Collection, Sequence

from PIL import Image
from torch import Tensor

from vqrae.common.files import printable
from vqrae.common.images import data_uri
from vqrae.data.word_tokenizer import unknown_words
from vqrae.demo.codes import Frame, Neighbor, Reading
from vqrae.demo.visitors import MAX_BYTES
from vqrae.understanding.chat import Chat

Figure = tuple[str, str]
"""HTML of an image, and its caption."""


def safe(text: str) -> str:
    """A text of a visitor or a model as HTML."""
    return html.escape(printable(text))


def image_tag(image: Tensor | Image.Image, alt: str, overlay: str = "") -> str:
    """An image with an overlay."""
    return f'<div class="framed"><img src="{data_uri(image)}" alt="{safe(alt)}">{overlay}</div>'


def figures(*each: Figure, kind: str = "figures") -> str:
    """Images in a row, with captions."""
    parts = [f"<figure>{image}<figcaption>{text}</figcaption></figure>" for image, text in each]
    return f'<div class="{kind}">{"".join(parts)}</div>'


def message(text: str) -> str:
    """What a visitor is told; nothing for an empty text."""
    return f'<p class="missing fault">{safe(text)}</p>' if text else ""


def remark(text: str) -> str:
    """A line that is not an error; text between backticks is set as code."""
    marked = re.sub("`([^`]+)`", r"<code>\1</code>", safe(text))
    return f'<p class="missing">{marked}</p>'


def unknown(chat: Chat, question: str) -> str:
    """The words of a question that a model does not know, if any."""
    words = unknown_words(chat.text_tokenizer, question)
    return remark(f"words that the model does not know: {', '.join(words)}") if words else ""


def uploader(label: str, *, several: bool = False) -> str:
    """A button that sends images, also those that are dropped on it."""
    multiple = " multiple" if several else ""
    return (
        f'<label class="upload"><span>{label}</span>'
        f'<input type="file" accept="image/*"{multiple} data-limit="{MAX_BYTES}"></label>'
    )


def cells(codes: Tensor, marked: Collection[int] = ()) -> str:
    """A grid over an image: each patch knows its codes, which the pointer shows."""
    side = math.isqrt(len(codes))
    parts = []
    for patch, own in enumerate(codes.view(len(codes), -1).tolist()):
        words = " ".join(map(str, own))
        mark = ' class="marked"' if patch in marked else ""
        row, column = divmod(patch, side)
        title = f"row {row + 1}, column {column + 1}: {'code' if len(own) == 1 else 'codes'}"
        parts.append(f'<i data-patch="{patch}"{mark} title="{title} {words}"></i>')
    return f'<div class="cells" style="--side: {side}">{"".join(parts)}</div>'


def reading(found: Reading, patch: int | None = None) -> str:
    """Original, reconstruction and difference; patches of the original can be chosen."""
    marked = [] if patch is None else [patch]
    size = found.original.shape[-1]
    number = f"{len(found.codes):,} patches, {found.codes.numel():,} codes"
    return figures(
        (image_tag(found.original, "original", cells(found.codes, marked)), f"original, {size} px"),
        (image_tag(found.reconstruction, "reconstruction"), f"reconstruction from {number}"),
        (image_tag(found.difference, "difference"), f"difference x 4; PSNR {found.psnr:.1f} dB"),
    )


def neighborhood(found: Sequence[Neighbor], patch: int, side: int) -> str:
    """The codes of a patch, and what it would look like with their neighbours."""
    row, column = divmod(patch, side)
    parts = [f"<h3>Row {row + 1}, column {column + 1}</h3>"]
    several = found[-1].codebook > 0
    for codebook in range(found[-1].codebook + 1):
        own, *others = [each for each in found if each.codebook == codebook]
        title = f"code {own.code}" + (f" of codebook {codebook + 1}" if several else "")
        shown = [(image_tag(own.image, title), f"<b>{own.code}</b><br>this patch")]
        for other in others:
            text = f"<b>{other.code}</b><br>distance {other.distance:.2f}"
            shown.append((image_tag(other.image, f"code {other.code}"), text))
        parts += [f"<h4>{title}</h4>" if several else "", figures(*shown, kind="figures small")]
    note = "Each image shows the patch and its surroundings, decoded with that code instead."
    return "".join([*parts, f'<p class="note">{note}</p>'])


def edited(start: Tensor, image: Tensor, codes: Tensor, changed: int, held: int | None) -> str:
    """What the codes decode to now, and before they were edited."""
    marked = [] if held is None else [held]
    text = f"{changed} of {len(codes)} patches changed"
    return figures(
        (image_tag(image, "edited", cells(codes, marked)), text),
        (image_tag(start, "before"), "before"),
    )


def frame(images: Frame, seeds: Sequence[int]) -> str:
    """Generated images with their seeds, and how far they are."""
    shown = []
    for image, seed in zip(images.images, seeds, strict=True):
        shown.append((image_tag(image, f"seed {seed}"), f"seed {seed}"))
    share = f"{images.done} of {images.total} codes"
    width = 100 * images.done / images.total
    bar = f'<span class="bar"><i style="width: {width:.0f}%"></i></span>'
    return f'{figures(*shown)}<p class="note">{bar} {share}</p>'


def gallery(images: Sequence[Image.Image]) -> str:
    """The images that the next question is about."""
    if not images:
        return ""
    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail((192, 192))
    names = [f"image {number}" for number in range(1, len(images) + 1)]
    shown = [(image_tag(*pair), pair[1]) for pair in zip(small, names, strict=True)]
    return figures(*shown, kind="figures small")


def talk(turns: Sequence[tuple[str, str]]) -> str:
    """A conversation: questions, some with HTML of their images, and answers."""
    parts = []
    for question, answer in turns:
        parts.append(f'<div class="asked">{question}</div>')
        parts.append(f'<div class="answered">{safe(answer) or "…"}</div>')
    return "".join(parts)
