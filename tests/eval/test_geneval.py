"""GenEval: rules clause by clause, prompts byte for byte, folders, scores, the command."""

import hashlib
import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqrae.data.scenes.language import benchmark_prompts
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.geneval import evaluate
from vqrae.eval.geneval.folders import (
    list_samples,
    sample_path,
    score_folder,
    write_grids,
    write_prompts,
)
from vqrae.eval.geneval.judges import (
    Judges,
    require_sight,
)
from vqrae.eval.geneval.prompts import (
    OBJECT_NAMES,
    OFFICIAL_MD5,
    metadata_lines,
    official_prompts,
    suite_name,
)
from vqrae.eval.geneval.rules import (
    Detection,
    evaluate_image,
    summarize,
    wilson_interval,
)
from vqrae.eval.geneval.scenes import satisfying_images

IMAGE = Image.new("RGB", (100, 100))


class FakeDetector:
    """Sees the same objects in every image, and counts the images."""

    name, threshold, counting_threshold = "fake", 0.3, 0.9

    def __init__(self, *detections: Detection, patience: int = 1000) -> None:
        self.detections, self.patience, self.seen = list(detections), patience, 0

    def detect(self, image: Image.Image) -> list[Detection]:
        self.seen += 1
        if self.seen > self.patience:
            raise KeyboardInterrupt
        return self.detections


class NoColors:
    """Is never asked: no prompt here names a colour."""

    def classify(self, *arguments: Any) -> list[str]:
        raise AssertionError


def at(name: str, x: float, y: float, *, size: float = 10, score: float = 0.95) -> Detection:
    """A square object around (x, y)."""
    return Detection(name, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def record(tag: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": f"a photo of {tag}", **more}


# ---- rules


def test_verdicts_are_those_of_the_official_script() -> None:
    """Random cases; the script of the same name made the numbers from GenEval's own code."""
    file = Path(__file__).parent / "golden" / "geneval.json"
    script, expected = runpy.run_path(str(file.with_suffix(".py"))), json.loads(file.read_text())
    found = [script["outcome"](script["ours"](*case)) for case in script["cases"](len(expected))]
    assert found == expected
    assert 50 < sum(correct for correct, _, _ in expected) < 250


CAT = {"class": "cat", "count": 1}
TWO_CATS = record("counting", CAT | {"count": 2}, exclude=[CAT | {"count": 3}])


def test_a_wrong_colour_hides_its_position_and_a_score_must_exceed_the_threshold() -> None:
    """No official prompt asks for both, and no random score equals the threshold."""

    class Blue:
        def classify(self, image: Any, detections: list[Any], class_name: str) -> list[str]:
            return ["blue"] * len(detections)

    left = {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]}
    asked = record("position", {"class": "dog", "count": 1}, left)
    seen = FakeDetector(at("cat", 80, 50), at("dog", 20, 50), at("cat", 9, 9, score=0.3))
    row = evaluate_image(IMAGE, asked, seen, Blue())
    assert row["reason"] == "expected red cat>=1, found 0 red; and 1 blue"
    assert len(json.loads(row["details"])["cat"]) == 1


def test_summary() -> None:
    verdicts = [(True, "a"), (False, "a"), (False, "b"), (False, "b")]
    rows = [{"tag": "colors", "correct": c, "metadata": m} for c, m in verdicts]
    rows += [{"tag": "position", "correct": True, "metadata": "c"}]
    summary = summarize(rows)
    assert (summary["colors"], summary["position"], summary["overall"]) == (0.25, 1.0, 0.625)
    assert (summary["correct_images"], summary["correct_prompts"]) == (0.4, pytest.approx(2 / 3))
    assert (summary["num_images"], summary["num_prompts"]) == (5, 3)
    with pytest.raises(ValueError, match="no results"):
        summarize([])


def test_intervals() -> None:
    """Four images of each of ten prompts, all alike within a prompt, are ten observations."""
    rows = [{"tag": "colors", "correct": i < 20, "metadata": str(i // 4)} for i in range(40)]
    found = summarize(rows)["intervals"]
    assert found["colors"] == wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert found["overall"] == pytest.approx(found["colors"])
    rows = [{"tag": f"{i % 4}", "correct": True, "metadata": str(i)} for i in range(40)]
    low, high = summarize(rows)["intervals"]["overall"]  # four tasks: sqrt(4) / 4 of one task's
    assert (low, high) == (pytest.approx(1 - (1 - wilson_interval(10, 10)[0]) / 2), 1)


# ---- prompts


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def test_the_official_suite_byte_for_byte() -> None:
    records = official_prompts()
    assert md5(metadata_lines(records)) == OFFICIAL_MD5 == "9a0ed515640279a48ed3380d90aec0ed"
    assert md5("".join(name + "\n" for name in OBJECT_NAMES)) == "7ea7783eb92bc46a58d6316e9196247b"
    counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94}
    assert Counter(r["tag"] for r in records) == counts | {"position": 100, "color_attr": 100}
    assert suite_name(records) == "official"
    assert [len(official_prompts(seed)) for seed in (0, 42)] == [548, 559]
    assert suite_name(official_prompts(0)).startswith("md5:")


# ---- folders

RECORDS = (record("single_object", CAT), TWO_CATS)


def fake_judges(*detections: Detection, weights: str = "1", patience: int = 1000) -> Judges:
    detector = FakeDetector(*detections, patience=patience)
    return Judges("GenEval", detector, NoColors(), frozenset(["cat"]), {"detector": weights})


def fill(folder: Path) -> Path:
    """Two prompts with two images each."""
    write_prompts(folder, RECORDS)
    for i in range(4):
        path = sample_path(folder, i // 2, i % 2)
        path.parent.mkdir(exist_ok=True)
        IMAGE.save(path)
    return folder


class TestFolders:
    def test_layout_and_rows(self, tmp_path: Path) -> None:
        rows, broken = score_folder(fill(tmp_path), fake_judges(at("cat", 20, 20)))
        assert ([row["correct"] for row in rows], broken) == ([True, True, False, False], {})
        keys = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
        assert list(rows[0]) == keys
        assert rows[3]["filename"] == str(tmp_path / "00001" / "samples" / "00001.png")
        assert json.loads(rows[2]["metadata"]) == TWO_CATS
        assert json.loads(rows[0]["details"]) == {"cat": [[15, 15, 25, 25, 0.95]]}
        write_prompts(tmp_path, RECORDS)  # the same again is fine
        with pytest.raises(ValueError, match="belongs to another benchmark"):
            write_prompts(tmp_path, RECORDS[::-1])

    def test_numbers_name_folders_and_images_of_every_format(self, tmp_path: Path) -> None:
        for prompt in ("10", "9", "notes"):
            (tmp_path / prompt / "samples").mkdir(parents=True)
            (tmp_path / prompt / "metadata.jsonl").write_text(json.dumps(RECORDS[0]))
            for name in ("10.jpg", "9.WEBP", "grid.png"):
                IMAGE.save(tmp_path / prompt / "samples" / name)
            (tmp_path / prompt / "samples" / "1.txt").touch()
        names = [str(path.relative_to(tmp_path / "9")) for path, _ in list_samples(tmp_path)[:2]]
        assert names == ["samples/9.WEBP", "samples/10.jpg"]
        assert len(list_samples(tmp_path)) == 4
        write_grids(tmp_path)
        assert Image.open(tmp_path / "9" / "grid.png").size == (200, 100)
        IMAGE.save(tmp_path / "9" / "samples" / "010.png")
        with pytest.raises(ValueError, match=r"010\.png and .*10\.jpg are both sample 10"):
            list_samples(tmp_path)

    def test_empty_and_broken_folders(self, tmp_path: Path) -> None:
        judges = fake_judges(at("cat", 20, 20))
        with pytest.raises(ValueError, match="holds no images"):
            score_folder(tmp_path, judges)
        cut = sample_path(fill(tmp_path), 1, 1)
        cut.write_bytes(cut.read_bytes()[:40])
        rows, broken = score_folder(tmp_path, judges)
        assert (len(rows), list(broken)) == (3, [str(cut)])
        assert "not a readable image" in broken[str(cut)]
        for path, _ in list_samples(tmp_path):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"none of 4 images can be read; the first: .*0\.png"):
            score_folder(tmp_path, judges)
        (tmp_path / "00000" / "metadata.jsonl").write_text("{")
        with pytest.raises(ValueError, match="not valid JSON"):
            score_folder(tmp_path, judges)

    def test_an_interrupted_run_scores_only_the_rest(self, tmp_path: Path) -> None:
        folder, kept = fill(tmp_path / "p"), tmp_path / "rows"
        for i, (path, _) in enumerate(list_samples(folder)):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(path)  # equal images of a prompt have one row
        first = fake_judges(at("cat", 20, 20), patience=2)
        with pytest.raises(KeyboardInterrupt):
            score_folder(folder, first, kept=kept)
        second = fake_judges(at("cat", 60, 60))
        rows, _ = score_folder(folder, second, kept=kept)
        assert second.detector.seen == 2  # type: ignore[attr-defined]
        assert [json.loads(row["details"])["cat"][0][0] for row in rows] == [15, 15, 55, 55]
        Image.new("RGB", (8, 8), "red").save(sample_path(folder, 0, 0))
        for weights, count in (("1", 1), ("2", 4)):  # a new image; other weights
            judges = fake_judges(weights=weights)
            score_folder(folder, judges, kept=kept)
            assert judges.detector.seen == count  # type: ignore[attr-defined]


# ---- self-tests


def test_a_blind_detector_is_refused() -> None:
    match = r"fake fails on a known image.*expected cat>=1, found 0"
    with pytest.raises(RuntimeError, match=match):
        require_sight(FakeDetector(), NoColors(), IMAGE, RECORDS[0])
    require_sight(FakeDetector(at("cat", 20, 20)), NoColors(), IMAGE, RECORDS[0])


# ---- the command, with the rule-based detector: those of COCO need weights


def test_scores_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, folder, output = load_sprites("shapes"), tmp_path / "p", tmp_path / "o" / "s.json"
    prompts = benchmark_prompts(shapes.names, 2)
    write_prompts(folder, prompts)
    for i, (image, _) in enumerate(satisfying_images(prompts, shapes, image_size=64, per_prompt=2)):
        path = sample_path(folder, i // 2, i % 2)
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    path.write_bytes(path.read_bytes()[:-30])
    evaluate.main([f"images={folder}", f"output={output}"])
    values = json.loads(output.read_text())
    found = (values["benchmark"], values["overall"], values["num_images"])
    assert found == ("GenEval-scenes", 1, 23)
    assert values["incomplete"] == ["00011 has 1 of 2 images"]
    assert list(values["broken"]) == [str(path)]
    assert values["manifest"]["detector"] == "scene-detector(shapes)"
    assert values["manifest"]["suite"].startswith("md5:")
    assert len(output.with_suffix(".jsonl").read_text().splitlines()) == 23
    out = capsys.readouterr().out
    assert "INCOMPLETE: 1 prompts" in out
    assert "BROKEN: 1 images are not in the score; " in out


def test_prompts_only(tmp_path: Path) -> None:
    given = ["suite=official", "prompts_only=true"]
    evaluate.main([*given, f"output={tmp_path / 's.json'}"])
    assert md5((tmp_path / "evaluation_metadata.jsonl").read_text()) == OFFICIAL_MD5


def test_what_cannot_be_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output={tmp_path / 'o' / 's.json'}"
    write_prompts(tmp_path / "p", official_prompts()[:3])
    with pytest.raises(ValueError, match=r"detector scene-detector\(shapes\) does not know"):
        evaluate.main([f"images={tmp_path / 'p'}", f"output={tmp_path / 's.json'}"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit):  # before anything is generated
        evaluate.main(["suite=official", "model=nowhere", output])
    assert "743b7d99.pth" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    for arguments in ([], ["model=m", "images=."], ["images=nowhere"]):
        with pytest.raises(ValueError, match=r"model=|is not a folder"):
            evaluate.main([output, *arguments])
