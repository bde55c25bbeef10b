"""What visitors send: bad files and bad texts each get a clear message, odd ones an answer."""

import base64
import io
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqrae.demo import visitors
from vqrae.demo.visitors import MAX_BYTES, public, read_text, read_uploads
from vqrae.generation.generator import Generator

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(stream, kind, **options)
    return stream.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A small PNG file whose header promises an image of this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1000)
    file = b"\x89PNG\r\n\x1a\n"
    for chunk in (head, body):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file


def sent(data: bytes, name: str = "image.png") -> dict[str, object]:
    """A file as the page sends it."""
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"name": name, "size": len(data), "data": url}


PNG, JPEG = encoded("PNG"), encoded("JPEG")
BAD_FILES = {
    "empty": (sent(b""), "got an empty file"),
    "text": (sent(b"hello, I am an image\n" * 50), "unknown format"),
    "truncated png": (sent(PNG[: len(PNG) // 2]), "not a readable image"),
    "truncated jpeg": (sent(JPEG[: len(JPEG) // 2]), "not a readable image"),
    "truncated webp": (sent(encoded("WEBP")[:300]), "not a readable image"),
    "truncated gif": (sent(encoded("GIF")[:200]), "not a readable image"),
    "head only": (sent(PNG[:24]), "not a readable image"),
    "damaged": (sent(PNG[:60] + bytes(200) + PNG[260:]), "not a readable image"),
    "bomb": (sent(png_that_says(60_000, 60_000)), "not a readable image|million"),
    "large": (
        sent(png_that_says(8_000, 4_001)),
        "8,000 x 4,001 pixels, expected at most 32",
    ),
    "real bomb": (sent(encoded("PNG", Image.new("1", (9_000, 9_000)))), "9,000 x 9,000 pixels"),
    "large bmp": (sent(encoded("BMP")[:18] + struct.pack("<ii", 9_000, 9_000)), "readable|million"),
    "svg": (sent(SVG, "image.svg"), "image.svg: not a readable image"),
    "html": (sent(b"<html><script>alert(1)</script>"), "unknown format"),
    "pdf": (sent(b"%PDF-1.7\n%" + bytes(100)), "unknown format"),
    "program": (sent(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a readable image"),
    "archive": (sent(b"PK\x03\x04" + bytes(100)), "unknown format"),
    "noise": (sent(NOISE.tobytes()), "unknown format"),
    "100 MB": (
        {"name": "a.png", "size": 100_000_000, "data": None},
        "got 100 MB, expected at",
    ),
    "a lie": (
        {"name": "a.png", "size": 1, "data": "A" * (MAX_BYTES * 2)},
        "expected at most 10 MB",
    ),
    "not base64": ({"name": "a.png", "size": 9, "data": "data:,???!"}, "did not arrive whole"),
    "nothing": ({"name": "a.png"}, "got no content"),
    "outside": (sent(b"x", "../../etc/pass\x1bwd"), r"^pass\\x1bwd: not a readable image"),
}
GOOD_FILES = {
    "cmyk": encoded("JPEG", Image.fromarray(NOISE).convert("CMYK")),
    "16 bits": encoded("PNG", Image.fromarray(np.full((9, 9), 40_000, np.uint16))),
    "palette": encoded("GIF", Image.fromarray(NOISE).convert("P"), transparency=0),
    "thin": encoded("PNG", Image.new("RGB", (1, 3000))),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_a_message(name: str) -> None:
    file, expected = BAD_FILES[name]
    with pytest.raises(ValueError, match=expected) as caught:
        read_uploads([file])
    text = public(caught.value)
    assert len(text) < 200
    assert "0x" not in text  # no address of an object


def test_odd_files_are_images_and_too_many_are_refused() -> None:
    images = read_uploads([sent(data) for data in GOOD_FILES.values()])
    assert [image.mode for image in images] == ["RGB"] * len(GOOD_FILES)
    with pytest.raises(ValueError, match="got 9 images, expected at most 8"):
        read_uploads([sent(PNG)] * 9)
    for nonsense in (None, "image", [1], {"name": "a"}):
        with pytest.raises(ValueError, match="got no files"):
            read_uploads(nonsense)


def test_a_decoder_that_is_too_slow_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "DECODE_SECONDS", 0.01)
    monkeypatch.setattr(visitors, "open_image", lambda *_, **__: time.sleep(0.5))
    with pytest.raises(ValueError, match=r"could not be decoded within 0\.01 s"):
        read_uploads([sent(PNG)])


# ---- texts

REFUSED = {
    "": "got an empty prompt",
    "  \n\t ": "got an empty prompt",
    "a" * 10_000: "got a prompt of 10,000 characters, expected at most 1,000",
    "🟥" * 10_000: "got a prompt of 10,000 characters",
    "a red\0 circle": "control character U+0000",
    "\x1b[31ma red circle": r"control character U\+001B",
    "a circle\x7f": r"control character U\+007F",
    "ring \x07": r"control character U\+0007",
    "half \ud800": r"control character U\+D800",
    "\ue000": r"control character U\+E000",
    "c1 \x9b": r"control character U\+009B",
}
STRANGE = [
    "🟥 🔵",
    "xyzzy plugh",
    "<image> <|im_end|> [BOI]",
    "<script>alert(1)</script>",
    "{{7*7}} ${alert(1)}",
    "'; DROP TABLE images; --",
    "赤い円の写真",
    "\u202eelcric der a",
    "z\u0351\u0357a\u0300\u0301lgo",
    "a photo of " + "a red circle and " * 50,
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_a_bad_text_gets_a_message(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[text].replace("U+", "U\\+").replace("\\\\", "\\")):
        read_text(text, "prompt")


def test_strange_texts_are_generated_from_with_a_remark(generator: Path) -> None:
    model = Generator.from_pretrained(generator)
    prompts = [read_text(text, "prompt") for text in STRANGE]
    for prompt in prompts:
        assert model.encode_prompt.losses(prompt), prompt
    images = model.images(prompts, seeds=range(len(prompts)))
    assert bool(images.isfinite().all())
    assert read_text(" a  red\ncircle ", "prompt") == "a red circle"
    for nothing in (None, 5, ["a"]):
        with pytest.raises(ValueError, match="got an empty question"):
            read_text(nothing, "question")


def test_no_folder_of_the_machine_is_told() -> None:
    paths = r"/srv/runs/generation needs C:\models\tokenizer and /a/b c/d: 1/2"
    error = ValueError(f"generator\n{paths}")
    assert public(error) == "generator generation needs tokenizer and b c/d: 1/2"
    assert public(KeyError()) == "KeyError"
    assert "https://a/b/c" in public(ValueError("see https://a/b/c"))
    assert re.fullmatch(r"runs/x: no such run", public(ValueError("runs/x: no such run")))
