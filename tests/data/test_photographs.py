"""Photographs of packages: what is taken, the split by photograph, what a refusal says."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqrae.common.errors import exit_code
from vqrae.data import photographs
from vqrae.data.sources import open_images


def webp(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=95)
    return stream.getvalue()


def resource(*data: bytes) -> bytes:
    """A resource file of Qt, as far as its data go."""
    body = b"".join(struct.pack(">I", len(each)) + each for each in data)
    return struct.pack(">4s5I", b"qres", 3, 0, 24, 24 + len(body), 0) + body + b"names and tree"


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked package: 40 photographs, one of them twice, and a sound, which is RIFF too."""
    folder = tmp_path / "debian/usr/share/gcompris-qt/rcc"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8)) for _ in range(40)]
    large = [image.resize((450, 300), Image.Resampling.BICUBIC) for image in coarse]
    sound = b"RIFF\0\0\0\0WAVE"
    for activity in photographs.ACTIVITIES:
        (folder / f"{activity}.rcc").write_bytes(resource(sound))
    monkeypatch.setattr(photographs, "package_images", lambda *arguments: [])
    first = [webp(image) for image in large]
    again = webp(large[7].resize((225, 150)))
    (folder / "categorization.rcc").write_bytes(resource(sound, *first))
    (folder / "explore_monuments.rcc").write_bytes(resource(again))
    return tmp_path / "debian"


def test_no_photograph_is_on_both_sides(debian: Path, tmp_path: Path) -> None:
    output = tmp_path / "train"
    for _ in range(2):  # the same again
        photographs.main([f"output={output}", f"debian={debian}"])
        files = {name: sorted((tmp_path / name).glob("*.png")) for name in ("train", "test")}
        assert len(files["train"]) + len(files["test"]) == 40  # each once
    assert 2 <= len(files["test"]) <= 16
    for file in files["test"]:
        assert photographs.is_held_out_photograph(file.stem)
    with Image.open(files["train"][0]) as image:
        assert image.size == (384, 256)
    assert "Creative Commons" in (output / "SOURCES.md").read_text()
    crops = open_images(str(output), image_size=128, split="all", crop="zoom")
    assert len(crops) == len(files["train"])
    assert crops[0]["image"].shape == (3, 128, 128)


def test_a_missing_package_is_named(
    debian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"output={tmp_path / 'train'}", f"debian={tmp_path}"]
    assert exit_code(lambda: photographs.main(arguments), "photographs") == 2
    error = capsys.readouterr().err
    assert "apt-get install gcompris-qt-data" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "train").exists()


def test_a_missing_python_package_is_named() -> None:
    with pytest.raises(ValueError, match="photographs need some-package: pip install some-package"):
        photographs.package_images("some-package", "no_such_module", "images/*.jpg")
    names = [
        name for name, _ in photographs.package_images("scikit-image", "skimage", "data/*.png")
    ]
    assert {f"skimage-{name}" for name in photographs.SKIMAGE} <= set(names)
