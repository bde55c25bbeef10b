"""`vqrae check-data` on sources with everything wrong that it looks for."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vqrae.data.checks import check_source
from vqrae.data.code_shards import CodeManifest, CodeWriter
from vqrae.data.report import EDGE_RANGES, edge_range
from vqrae.scripts.cli import main


def image(index: int, size: tuple[int, int] = (70, 80), mode: str = "RGB") -> bytes:
    stream, (width, height) = io.BytesIO(), size
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG" if mode == "CMYK" else "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sound images beside a truncated one, a text file in disguise, a duplicate, a CMYK and a panorama."""
    folder = tmp_path / "images"
    folder.mkdir()
    files = {f"{i}.png": image(i) for i in range(4)}
    files |= {
        "cut.png": image(4)[:300],
        "text.jpg": b"<html>",
        "copy.png": image(0),
        "print.jpg": image(5, mode="CMYK"),
    }
    files["wide.png"] = image(6, (400, 100))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_everything_wrong(folder: Path, workers: int) -> None:
    report = check_source(str(folder), workers=workers)
    assert (report.samples, report.read, report.num_problems) == (9, 9, 2)
    assert [
        Path(line.split(":")[0]).name for line in report.problems["broken images"].examples
    ] == ["cut.png", "text.jpg"]
    assert report.modes == {"RGB": 6, "CMYK": 1}
    assert report.shorter_edges["64-127"] == 7
    assert report.notes["stored as CMYK, read as RGB"].examples == [str(folder / "print.jpg")]
    assert report.notes["duplicates"].examples == [f"{folder / 'copy.png'} = {folder / '0.png'}"]
    assert "wide.png (400 x 100)" in report.notes["more than 3 times as long as wide"].examples[0]


def test_the_command_reports_and_its_exit_code_tells(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", str(folder), "--json", str(tmp_path / "report.json")]) == 1
    output = capsys.readouterr()
    assert "problem: 2 broken images" in output.out
    assert "9 of 9 samples read, 2 problems" in output.out
    assert "check-data 9/9" in output.err
    [report] = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"]["broken images"]["count"] == 2
    assert report["shorter_edges"] == {**dict.fromkeys(EDGE_RANGES, 0), "64-127": 7}

    for name in ("cut.png", "text.jpg"):
        (folder / name).unlink()
    assert main(["check-data", f"{folder}*1+emoji*1", "--limit", "5"]) == 0
    output = capsys.readouterr()
    assert "5 of 7 samples read, no problem found" in output.out
    assert "5 of 4009 samples read, no problem found" in output.out
    assert main(["check-data", "scenes"]) == 0
    assert main(["check-data", str(folder / "nowhere.tar")]) == 2
    assert main(["check-data", str(folder), "--limit", "-1"]) == 2


def test_tars(tmp_path: Path) -> None:
    samples: list[dict] = [
        {"png": image(0), "txt": "a caption"},
        {"png": image(1), "txt": " "},
        {"png": image(2)},
    ]
    samples += [
        {"png": image(3)[:500], "txt": "cut"},
        {"png": image(0), "json": {"caption": "a copy"}},
    ]
    for name in ("a", "b"):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for i, sample in enumerate(samples if name == "a" else samples[:1]):
                writer.write({"__key__": str(i), **sample})
    damaged = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(damaged[: len(damaged) // 2])
    report = check_source(str(tmp_path / "*.tar"))
    assert report.captions == 4
    assert {name: finding.count for name, finding in report.problems.items()} == {
        "damaged tars": 1,
        "empty captions": 1,
        "broken images": 1,
    }
    assert report.problems["empty captions"].examples == [f"{tmp_path / 'a.tar'}, 1.png"]
    assert report.notes["duplicates"].count == 1
    assert report.notes["images without a readable caption, left out of pairs"].examples == [
        f"{tmp_path / 'a.tar'}, 2.png"
    ]


def test_caption_files(folder: Path) -> None:
    lines = [
        json.dumps({"image": name, "caption": "x" * (name != "1.png")})
        for name in ("0.png", "1.png", "no.png", "cut.png")
    ]
    (folder / "pairs.jsonl").write_text("\n".join([*lines, "{", '{"image": "2.png"}']))
    report = check_source(str(folder / "pairs.jsonl"))
    assert {name: finding.count for name, finding in report.problems.items()} == {
        "unusable lines": 2,
        "missing images": 1,
        "empty captions": 1,
        "broken images": 1,
    }
    assert report.problems["unusable lines"].examples[0].startswith("line 5")


def test_llava_files(folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    plain = [{**turn, "value": "word"} for turn in turns]
    records = [{"id": "twice", "image": "0.png", "conversations": turns}] * 2
    records += [
        {"id": str(i), "image": name, "conversations": turns}
        for i, name in enumerate(["cut.png", "no.png"])
    ]
    records += [
        {"id": "no tag", "image": "1.png", "conversations": plain},
        {"id": "no image", "conversations": turns},
    ]
    records.append({"id": "text", "conversations": plain})
    (tmp_path / "chat.json").write_text(json.dumps(records))
    report = check_source(str(tmp_path / "chat.json"), image_folder=folder)
    assert report.read == 2, "each image once"
    assert [finding.count for finding in report.problems.values()] == [2, 1, 1]
    tags, missing, broken = report.problems.values()
    assert "record 4 (no tag): has 1 image, but 0 <image> tags" in tags.examples[0]
    assert "record 5 (no image): has no image, but 1" in tags.examples[1]
    assert missing.examples == [str(folder / "no.png")]
    assert "cut.png" in broken.examples[0]


def test_edges_of_the_histogram() -> None:
    assert [edge_range(pixels) for pixels in (1, 63, 64, 127, 1023, 1024, 9999)] == [
        *["< 64"] * 2,
        *["64-127"] * 2,
        "512-1023",
        *[">= 1024"] * 2,
    ]


def test_a_code_set_is_compared_with_its_checksums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = CodeManifest(
        tokenizer_fingerprint="a" * 64,
        codebook_size=10,
        grid_size=1,
        source="test",
        num_images=6,
        shard_size=2,
    )
    writer = CodeWriter(tmp_path, manifest)
    for shard in range(3):
        writer.write(shard, np.array([[shard], [shard + 1]]), [["a red circle"], ["", "two words"]])
    report = check_source(str(tmp_path))
    assert (report.samples, report.read, report.num_problems) == (6, 6, 0)
    assert (report.captions, report.caption_words) == (9, 15)
    assert report.notes["codes of the codebook that no image uses"].count == 6
    assert report.notes["empty captions"].examples == ["image 1", "image 3", "image 5"]
    assert check_source(str(tmp_path), limit=3).read == 4  # whole shards

    path = tmp_path / "shard-00002.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert main(["check-data", str(tmp_path)]) == 1
    assert "shard-00002.npy is damaged (it has changed" in capsys.readouterr().out
