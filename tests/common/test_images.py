"""Images of crawled data: odd Exif tags, deep greys, transparency, damaged headers."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vqrae.common.images import (
    open_image,
    tensor_to_uint8,
)

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    return exif


def opened(data: bytes, **options: int) -> np.ndarray:
    return np.asarray(open_image(io.BytesIO(data), name="x", **options))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_equals_pillows(form: str, orientation: int) -> None:
    options = (
        {"tiffinfo": {0x0112: orientation}} if form == "TIFF" else {"exif": exif_of(orientation)}
    )
    data = encode(NOISE, form, **options, **({"lossless": True} if form == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(opened(data), np.asarray(expected))


def test_an_odd_tag_costs_neither_the_image_nor_its_orientation() -> None:
    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack(">HHI", tag, kind, count) + value

    tags = entry(0x0112, 3, 1, b"\0\6\0\0") + entry(
        0x0118, 2, 4, b"abc\0"
    )  # 0x0118 should be a number
    data = encode(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + tags + bytes(4))
    assert opened(data).shape == (64, 48, 3)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"exif": exif_of(6)}),
        ("WEBP", {"exif": exif_of(6)}),
        ("PNG", {"exif": exif_of(6)}),
        ("TIFF", {"tiffinfo": {0x0112: 6}}),
        ("GIF", {}),
        ("BMP", {}),
        ("AVIF", {}),
        ("JPEG2000", {}),
        ("PPM", {}),
    ],
)
def test_damaged_headers_make_a_broken_image_and_nothing_else(form: str, options: dict) -> None:
    rng, data, errors = random.Random(0), encode(NOISE, form, **options), []
    warnings.simplefilter("ignore")  # pytest puts the filters back
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        try:
            opened(bytes(damaged[: rng.randrange(len(data)) if rng.random() < 0.2 else None]))
        except ValueError as error:
            errors.append(str(error))
    assert errors
    assert all(error.startswith("x: not a readable image") for error in errors)


def test_deep_and_float_grey_keep_their_brightness() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = (ramp * 255).round()
    for values in (
        ramp,
        ramp * 255,
        ramp * 65535,
        (ramp * 255).astype(np.int32),
        (ramp * 65535).astype(np.int32),
    ):
        grey = opened(encode(Image.fromarray(values), "TIFF"))[..., 0]
        assert abs(grey - expected).max() <= 1, (values.dtype, values.max())
    dark = (ramp * 200).astype(np.uint16)  # 16 bits say what white is
    assert opened(encode(Image.fromarray(dark), "PNG")).max() == 1
    holes = np.where(ramp > 0.5, np.nan, ramp)
    holes[0, 0], holes[0, 1] = np.inf, -np.inf
    assert opened(encode(Image.fromarray(holes), "TIFF")).max() == 127


def png(bit_depth: int, colour_type: int, row: bytes, transparent: bytes) -> bytes:
    """Two equal rows of two pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 2, bit_depth, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 2)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (png(4, 0, b"\x3a", struct.pack(">H", 3)), (170, 170, 170)),
        (png(2, 0, b"\x60", struct.pack(">H", 1)), (170, 170, 170)),
        (png(8, 0, b"\x03\xaa", struct.pack(">H", 3)), (170, 170, 170)),
        (png(16, 0, struct.pack(">2H", 1000, 43690), struct.pack(">H", 1000)), (170, 170, 170)),
        (
            png(
                16,
                2,
                struct.pack(">6H", 1000, 2000, 3000, 0, 43690, 0),
                struct.pack(">3H", 1000, 2000, 3000),
            ),
            (0, 170, 0),
        ),
        (png(8, 2, bytes([1, 2, 3, 0, 170, 0]), struct.pack(">3H", 1, 2, 3)), (0, 170, 0)),
    ],
)
def test_the_transparent_colour_of_a_png_becomes_white_at_any_depth(
    data: bytes, kept: tuple[int, int, int]
) -> None:
    assert opened(data)[0].tolist() == [[255, 255, 255], list(kept)]


def test_draft_decoding_keeps_the_edges_that_are_needed() -> None:
    data = encode(Image.new("RGB", (1000, 600), (10, 200, 30)), "JPEG")
    assert [opened(data, draft=edge).shape[:2] for edge in (0, 64, 300, 301)] == [
        (600, 1000),
        (75, 125),
        (300, 500),
        (600, 1000),
    ]
    assert opened(encode(NOISE, "PNG"), draft=8).shape == (48, 64, 3)


def test_programs_and_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an EPS file is a program"):
        opened(encode(NOISE, "EPS"))
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    with pytest.raises(ValueError, match="exceeds limit"):
        opened(b"\x89PNG\r\n\x1a\n" + chunk + encode(NOISE, "PNG")[33:])


def test_rounding_not_truncation() -> None:
    assert tensor_to_uint8(torch.tensor([0.999, -1.0, 2.0, 0.5])).tolist() == [255, 0, 255, 128]
    levels = torch.arange(256) / 255
    assert torch.equal(tensor_to_uint8(levels), torch.arange(256, dtype=torch.uint8))


def test_images_of_any_mode(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((4, 6), 40000, dtype=np.uint16))
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    palette = Image.new("RGB", (6, 4), "red").convert("P")
    turned = Image.new("RGB", (6, 4), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    grey.save(tmp_path / "grey.png")
    clear.save(tmp_path / "clear.png")
    palette.save(tmp_path / "palette.png")
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (156, 156, 156)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 0, 0)
    assert open_image(tmp_path / "turned.jpg").size == (4, 6)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for name, message in (("broken.png", "not a readable image"), ("absent.png", "no such file")):
        with pytest.raises(ValueError, match=message):
            open_image(tmp_path / name)
