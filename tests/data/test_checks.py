"""`vqrae check-data` on sources with everything wrong that it looks for."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from vqrae.data.checks import check_source
from vqrae.data.code_shards import CodeManifest, CodeWriter
from vqrae.data.report import EDGE_RANGES, edge_range
from vqrae.scripts.cli import main

Png = Callable[..., bytes]  # see conftest
Capture = pytest.CaptureFixture[str]

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
PLAIN = [{**turn, "value": "word"} for turn in TURNS]


def counts(findings: dict[str, Any]) -> dict[str, int]:
    return {name: finding.count for name, finding in findings.items()}


@pytest.fixture
def image(png: Png) -> Png:
    return lambda index, size=(70, 80): png(index, size, noise=True)


@pytest.fixture
def folder(image: Png, tmp_path: Path) -> Path:
    """Sound images, a truncated one, a text in disguise, a duplicate, a CMYK and a panorama."""
    folder = tmp_path / "images"
    folder.mkdir()
    printed = io.BytesIO()
    Image.open(io.BytesIO(image(5))).convert("CMYK").save(printed, "JPEG")
    files = {f"{i}.png": image(i) for i in range(4)}
    files |= {"cut.png": image(4)[:300], "text.jpg": b"<html>", "copy.png": image(0)}
    files |= {"print.jpg": printed.getvalue(), "wide.png": image(6, (400, 100))}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_everything_wrong(folder: Path, workers: int) -> None:
    report = check_source(str(folder), workers=workers)
    assert (report.samples, report.read, report.num_problems) == (9, 9, 2)
    broken = report.problems["broken images"].examples
    assert [Path(line.split(":")[0]).name for line in broken] == ["cut.png", "text.jpg"]
    assert report.shorter_edges["64-127"] == 7
    assert report.notes["stored as CMYK, read as RGB"].examples == [str(folder / "print.jpg")]
    assert report.notes["duplicates"].examples == [f"{folder / 'copy.png'} = {folder / '0.png'}"]
    assert "wide.png (400 x 100)" in report.notes["more than 3 times as long as wide"].examples[0]
    edges = [edge_range(pixels) for pixels in (1, 63, 64, 127, 1023, 1024, 9999)]
    assert edges == [*["< 64"] * 2, *["64-127"] * 2, "512-1023", *[">= 1024"] * 2]


def test_the_command_reports_and_its_exit_code_tells(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    escape = folder / "\x1b[31m.png"
    escape.write_bytes(b"")
    assert main(["check-data", str(folder), "--json", str(tmp_path / "report.json")]) == 1
    output = capsys.readouterr()
    assert "problem: 3 broken images" in output.out
    assert "10 of 10 samples read, 3 problems" in output.out
    assert "\x1b" not in output.out
    assert "check-data 10/10" in output.err
    [report] = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"]["broken images"]["count"] == 3
    assert report["shorter_edges"] == {**dict.fromkeys(EDGE_RANGES, 0), "64-127": 7}

    for path in (folder / "cut.png", folder / "text.jpg", escape):
        path.unlink()
    assert main(["check-data", f"{folder}*1+emoji*1+scenes*1", "--limit", "5"]) == 0
    output = capsys.readouterr()
    assert "5 of 7 samples read, no problem found" in output.out
    assert "5 of 4009 samples read, no problem found" in output.out
    assert main(["check-data", str(folder / "nowhere.tar")]) == 2
    assert main(["check-data", str(folder), "--limit", "-1"]) == 2


def test_tars(image: Png, tmp_path: Path) -> None:
    samples: list[dict] = [
        {"png": image(0), "txt": "a caption"},
        {"png": image(1), "txt": " "},
        {"png": image(2)},
        {"png": image(3)[:500], "txt": "cut"},
        {"png": image(0), "json": {"caption": "a copy"}},
    ]
    for name, count in (("a", 5), ("b", 1)):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for i, sample in enumerate(samples[:count]):
                writer.write({"__key__": str(i), **sample})
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 2])
    report, first = check_source(str(tmp_path / "*.tar")), tmp_path / "a.tar"
    assert report.captions == 4
    assert counts(report.problems) == {"damaged tars": 1, "empty captions": 1, "broken images": 1}
    assert report.problems["empty captions"].examples == [f"{first}, 1.png"]
    assert report.notes["duplicates"].count == 1
    uncaptioned = report.notes["images without a readable caption, left out of pairs"]
    assert uncaptioned.examples == [f"{first}, 2.png"]


def test_caption_files_and_the_clean_list(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    names = ("0.png", "1.png", "no.png", "cut.png", "pipe.png")
    lines = [json.dumps({"image": name, "caption": "x" * (name != "1.png")}) for name in names]
    source = folder / "pairs.jsonl"
    source.write_text("\n".join([*lines, "{", '{"image": "2.png"}']))
    report = check_source(str(source))
    problems = {"unusable lines": 2, "missing images": 1, "empty captions": 1, "broken images": 2}
    assert counts(report.problems) == problems
    assert report.problems["unusable lines"].examples[0].startswith("line 6")
    clean = folder / "clean.jsonl"
    assert main(["check-data", str(source), "--write-clean", str(clean)]) == 0
    assert clean.read_text() == lines[0] + "\n"
    for target in (source, folder / "clean.json", tmp_path / "clean.jsonl"):
        assert main(["check-data", str(source), "--write-clean", str(target)]) == 2


def test_llava_files_and_the_clean_list(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    blank, wordless = [PLAIN[0], {**PLAIN[1], "value": " "}], [{**PLAIN[0], "value": " "}, PLAIN[1]]
    good = {"id": "twice", "image": "0.png", "source": "kept", "conversations": TURNS}
    records = [
        *[good] * 2,
        {"id": "cut", "image": "cut.png", "conversations": TURNS},
        {"id": "gone", "image": "no.png", "conversations": TURNS},
        {"id": "no tag", "image": "1.png", "conversations": PLAIN},
        {"id": "no image", "conversations": TURNS},
        {"id": "text", "conversations": wordless},
        {"id": "blank", "conversations": blank},
    ]
    source = folder / "chat.json"
    source.write_text(json.dumps(records))
    report = check_source(str(source))
    assert report.read == 2, "each image once"
    blank_answers = "conversations with a blank answer, which teaches to say nothing"
    problems = {"unusable records": 2, "missing images": 1, "broken images": 1}
    assert counts(report.problems) == problems | {blank_answers: 1}
    first, second = report.problems["unusable records"].examples
    assert "record 4 (no tag): has 1 image, but 0 <image> tags" in first
    assert "record 5 (no image): has no image, but 1" in second
    assert report.problems["missing images"].examples == [str(folder / "no.png")]
    assert counts(report.notes) == {"conversations with a question that has no words": 1}

    clean = folder / "clean.json"
    assert main(["check-data", str(source), "--write-clean", str(clean)]) == 0
    assert "clean.json: 3 of 8 entries" in capsys.readouterr().out
    assert json.loads(clean.read_text()) == [good, good, records[6]]
    assert main(["check-data", str(clean)]) == 0


def test_a_code_set_is_compared_with_its_checksums(tmp_path: Path, capsys: Capture) -> None:
    sizes = {"codebook_size": 10, "grid_size": 1, "num_images": 6, "shard_size": 2}
    manifest = CodeManifest(tokenizer_fingerprint="a" * 64, source="test", **sizes)
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
