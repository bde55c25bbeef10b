"""GenEval's prompts: the official files byte for byte, fresh suites, and what training captions give away."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from vqrae.eval.geneval import OBJECT_NAMES, evaluate, official_prompts, suite_name
from vqrae.eval.geneval.leakage import leakage_report, normalized, training_captions
from vqrae.eval.geneval.prompts import OFFICIAL_MD5, metadata_lines


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def test_the_official_suite_byte_for_byte() -> None:
    records = official_prompts()
    assert md5(metadata_lines(records)) == OFFICIAL_MD5 == "9a0ed515640279a48ed3380d90aec0ed"
    assert (
        md5("".join(record["prompt"] + "\n" for record in records))
        == "2307726efc2127aecc59ca4997159bd1"
    )
    assert md5("".join(name + "\n" for name in OBJECT_NAMES)) == "7ea7783eb92bc46a58d6316e9196247b"
    counts = {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert Counter(record["tag"] for record in records) == counts
    assert suite_name(records) == "official"


@pytest.mark.parametrize(("seed", "count"), [(0, 548), (42, 559)])
def test_fresh_suites(seed: int, count: int) -> None:
    records = official_prompts(seed)
    assert len(records) == count
    assert suite_name(records).startswith("md5:")
    assert not any(
        clause.get("color")
        for r in records
        for clause in r["include"]
        if clause["class"] == "person"
    )


def test_the_command_writes_the_official_file(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text(
        "A photo of a bench!\na photo of a dog\nsomething else\n"
    )
    evaluate.main(["prompts_only=true", f"out={tmp_path}", f"captions={tmp_path / 'captions.txt'}"])
    assert md5((tmp_path / "evaluation_metadata.jsonl").read_text()) == OFFICIAL_MD5
    leakage = json.loads((tmp_path / "leakage.json").read_text())
    assert (leakage["exact"], leakage["normalized"], leakage["num_captions"]) == (1, 2, 3)


class TestLeakage:
    prompts = ("a photo of a cat", "a photo of a red dog", "a photo of two birds")

    def test_exact_normalised_and_contained(self) -> None:
        captions = [
            "a photo of a cat",
            "A Photo of a  RED dog.",
            "here is a photo of two birds, flying",
            "birds",
        ]
        report = leakage_report(self.prompts, captions)
        found = {
            key: report[key]
            for key in ("exact", "normalized", "contained", "template_captions", "num_captions")
        }
        assert found == {
            "exact": 1,
            "normalized": 2,
            "contained": 1,
            "template_captions": 2,
            "num_captions": 4,
        }
        assert report["examples"] == sorted(self.prompts)

    def test_part_of_a_word_is_no_match(self) -> None:
        report = leakage_report(
            self.prompts, ["a photo of a category of things", "a photo of a cat"]
        )
        assert (report["normalized"], report["contained"]) == (1, 0)

    def test_normal_form(self) -> None:
        assert (
            normalized("  A “Red”\tDog, \N{FULLWIDTH LATIN CAPITAL LETTER N}ow! ")
            == "a red dog now"
        )

    def test_sources_of_captions(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
        assert list(training_captions(str(tmp_path / "a.txt"), 2)) == ["one", "two"]
        lines = [
            {"image": "missing.png", "caption": "four"},
            {"image": "gone.png", "caption": "five"},
        ]
        (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert list(training_captions(str(tmp_path / "b.jsonl"))) == ["four", "five"]
        scenes = list(training_captions("scenes", 5))
        assert len(scenes) == 5
        assert all(caption.startswith("a photo of ") for caption in scenes)
        assert list(training_captions("scenes*0.5+emoji*0.5", 2))[:2] == scenes[:2]
