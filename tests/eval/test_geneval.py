"""GenEval's rules: golden cases for every clause and edge, folder layout, summary."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqrae.common.config import ConfigError
from vqrae.data.scenes.scene import COLORS as COLOR_VALUES
from vqrae.eval.geneval import (
    MAX_OBJECTS,
    Detection,
    confident_objects,
    evaluate,
    evaluate_image,
    judge,
    list_samples,
    official_prompts,
    relative_position,
    require_sight,
    sample_path,
    score_folder,
    summarize,
    wilson_interval,
    write_grids,
    write_prompts,
    write_rows,
)
from vqrae.eval.geneval.clip_colors import crop_object
from vqrae.eval.geneval.judges import mistaken_colors, sample_photograph
from vqrae.eval.geneval.scenes import SceneBenchmark, satisfying_images

IMAGE = Image.new("RGB", (100, 100))


class FakeDetector:
    """Sees the same objects in every image."""

    name, threshold, counting_threshold = "fake", 0.3, 0.9

    def __init__(self, *detections: Detection) -> None:
        self.detections = list(detections)

    def detect(self, image: Image.Image) -> list[Detection]:
        return self.detections


class FakeColors:
    """Reads the colour off a table by score, and remembers what it was asked."""

    def __init__(self, colors: dict[float, str] | None = None) -> None:
        self.colors, self.asked = colors or {}, []

    def classify(
        self, image: Image.Image, detections: Sequence[Detection], class_name: str
    ) -> list[str]:
        self.asked.append((class_name, len(detections)))
        return [self.colors[detection.score] for detection in detections]


def at(name: str, x: float, y: float, *, size: float = 10, score: float = 0.95) -> Detection:
    """A square object around (x, y)."""
    return Detection(name, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def record(
    tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    values = {"tag": tag, "include": list(include), "prompt": f"a photo of {tag}"}
    return {**values, "exclude": list(exclude)} if exclude else values


def verdict(
    metadata: dict[str, Any], *detections: Detection, colors: FakeColors | None = None
) -> tuple[bool, str]:
    row = evaluate_image(IMAGE, metadata, FakeDetector(*detections), colors or FakeColors())
    return row["correct"], row["reason"]


class TestCounts:
    def test_more_objects_than_asked_for_are_fine(self) -> None:
        one = record("single_object", {"class": "cat", "count": 1})
        assert verdict(one, at("cat", 20, 20), at("cat", 60, 60), at("dog", 80, 80)) == (True, "")

    def test_too_few(self) -> None:
        assert verdict(record("counting", {"class": "cat", "count": 3}), at("cat", 20, 20)) == (
            False,
            "expected cat>=3, found 1",
        )

    def test_exclude_forbids_one_more(self) -> None:
        two = record(
            "counting", {"class": "cat", "count": 2}, exclude=[{"class": "cat", "count": 3}]
        )
        cats = [at("cat", x, 50) for x in (10, 40, 70)]
        assert verdict(two, *cats[:2]) == (True, "")
        assert verdict(two, *cats) == (False, "expected cat<3, found 3")

    def test_every_clause_must_hold_and_all_reasons_are_told(self) -> None:
        both = record("two_object", {"class": "cat", "count": 1}, {"class": "dog", "count": 1})
        assert verdict(both) == (False, "expected cat>=1, found 0\nexpected dog>=1, found 0")


class TestThresholds:
    def test_strictly_above_and_stricter_for_counting(self) -> None:
        cat = {"class": "cat", "count": 1}
        assert verdict(record("colors", cat), at("cat", 5, 5, score=0.31))[0]
        assert not verdict(record("colors", cat), at("cat", 5, 5, score=0.3))[0]
        assert not verdict(record("counting", cat), at("cat", 5, 5, score=0.9))[0]
        assert verdict(record("counting", cat), at("cat", 5, 5, score=0.91))[0]

    def test_best_first_and_at_most_sixteen(self) -> None:
        found = confident_objects([at("cat", 5, 5, score=0.5 + i / 100) for i in range(20)], 0.3)[
            "cat"
        ]
        assert len(found) == MAX_OBJECTS == 16
        assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
        assert found[0].score == pytest.approx(0.69)


class TestColors:
    red_cat = record("colors", {"class": "cat", "count": 1, "color": "red"})

    def test_only_the_most_confident_are_looked_at(self) -> None:
        colors = FakeColors({0.9: "blue", 0.8: "red"})
        cats = (at("cat", 20, 20, score=0.8), at("cat", 60, 60, score=0.9))
        assert verdict(self.red_cat, *cats, colors=colors) == (
            False,
            "expected red cat>=1, found 0 red; and 1 blue",
        )
        assert colors.asked == [("cat", 1)]

    def test_every_one_of_count_must_match(self) -> None:
        two = record("colors", {"class": "cat", "count": 2, "color": "red"})
        cats = (at("cat", 20, 20, score=0.8), at("cat", 60, 60, score=0.9))
        assert verdict(two, *cats, colors=FakeColors({0.9: "red", 0.8: "red"}))[0]
        reason = "expected red cat>=2, found 1 red; and 1 red, 1 blue"
        assert verdict(two, *cats, colors=FakeColors({0.9: "blue", 0.8: "red"})) == (False, reason)

    def test_no_colour_is_asked_of_a_missing_object(self) -> None:
        colors = FakeColors()
        assert verdict(self.red_cat, colors=colors) == (False, "expected cat>=1, found 0")
        assert colors.asked == []


class TestPositions:
    prompt = record(
        "position",
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    )

    @pytest.mark.parametrize(
        ("offset", "expected"),
        [
            ((-30, 0), {"left of"}),
            ((30, 0), {"right of"}),
            ((0, -30), {"above"}),
            ((0, 30), {"below"}),
            ((-30, -30), {"left of", "above"}),
            ((0, 0), set()),
            ((2, -2), set()),  # within 0.1 x (10 + 10) on both axes
            ((2.5, 0), set()),  # revised 0.5 / 2.5 = 0.2 of the offset
            ((4.1, 0), {"right of"}),  # revised 2.1 / 4.1 = 0.51
            ((4, 0), set()),  # revised 2 / 4 is not above 0.5
            ((30, 15), {"right of"}),  # down: revised 13 / 33.5 = 0.39
        ],
    )
    def test_margin_and_direction(self, offset: tuple[float, float], expected: set[str]) -> None:
        a, b = at("cat", 50 + offset[0], 50 + offset[1]), at("dog", 50, 50)
        assert relative_position(a.box, b.box) == expected

    def test_direction_is_measured_against_the_unrevised_offset(self) -> None:
        """A diagonal offset (20, 20) of large objects: revised 8 on both axes, 0.28 of the offset each."""
        assert (
            relative_position(at("a", 70, 70, size=60).box, at("b", 50, 50, size=60).box) == set()
        )

    def test_clause(self) -> None:
        assert verdict(self.prompt, at("cat", 20, 50), at("dog", 80, 50))[0]
        assert verdict(self.prompt, at("cat", 80, 50), at("dog", 20, 50)) == (
            False,
            "expected cat left of target, found right of target",
        )

    def test_missing_target_fails(self) -> None:
        assert verdict(self.prompt, at("cat", 20, 50)) == (
            False,
            "expected dog>=1, found 0\nno target for cat to be left of",
        )

    def test_target_that_violates_its_own_clause_is_no_target(self) -> None:
        prompt = record(
            "position", {"class": "dog", "count": 1, "color": "red"}, self.prompt["include"][1]
        )
        objects = confident_objects([at("cat", 20, 50), at("dog", 80, 50, score=0.8)], 0.3)
        result = judge(IMAGE, objects, prompt, FakeColors({0.8: "blue"}))
        assert result.reason.endswith("no target for cat to be left of")

    def test_every_pair_must_hold(self) -> None:
        prompt = record(
            "position",
            {"class": "dog", "count": 2},
            {"class": "cat", "count": 1, "position": ["left of", 0]},
        )
        assert verdict(prompt, at("cat", 20, 50), at("dog", 80, 40), at("dog", 80, 60))[0]
        assert not verdict(prompt, at("cat", 50, 50), at("dog", 80, 50), at("dog", 20, 50))[0]

    def test_position_is_not_judged_where_the_colour_is_wrong(self) -> None:
        clause = {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]}
        prompt = record("position", {"class": "dog", "count": 1}, clause)
        colors = FakeColors({0.95: "blue"})
        reason = verdict(prompt, at("cat", 80, 50), at("dog", 20, 50), colors=colors)[1]
        assert reason == "expected red cat>=1, found 0 red; and 1 blue"


class TestFolders:
    records = (
        record("single_object", {"class": "cat", "count": 1}),
        record("counting", {"class": "cat", "count": 2}, exclude=[{"class": "cat", "count": 3}]),
    )

    def known(self) -> list[tuple[Image.Image, dict[str, Any]]]:
        return [(IMAGE, self.records[0])]

    def fill(self, folder: Path, samples: int = 2) -> None:
        write_prompts(folder, self.records)
        for i in range(len(self.records)):
            for sample in range(samples):
                path = sample_path(folder, i, sample)
                path.parent.mkdir(exist_ok=True)
                IMAGE.save(path)

    def test_layout_and_rows(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        assert (tmp_path / "00001" / "samples" / "00000.png").is_file()
        assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == self.records[1]
        detector = FakeDetector(at("cat", 20, 20, score=0.95))
        rows = score_folder(tmp_path, detector, FakeColors(), known=self.known())
        assert [row["correct"] for row in rows] == [True, True, False, False]
        assert list(rows[0]) == [
            "filename",
            "tag",
            "prompt",
            "correct",
            "reason",
            "metadata",
            "details",
        ]
        assert json.loads(rows[0]["metadata"]) == self.records[0]
        assert json.loads(rows[0]["details"]) == {"cat": [[15, 15, 25, 25, 0.95]]}
        write_rows(tmp_path / "results.jsonl", rows)
        assert [
            json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()
        ] == rows

    def test_only_digits_count(self, tmp_path: Path) -> None:
        self.fill(tmp_path, samples=1)
        for name in ("00000/samples/grid.png", "00000/samples/1.txt", "00000/grid.png"):
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "notes").mkdir()
        (tmp_path / "7").mkdir()  # any number of digits
        (tmp_path / "7" / "metadata.jsonl").write_text(json.dumps(self.records[0]))
        (tmp_path / "7" / "samples").mkdir()
        IMAGE.save(tmp_path / "7" / "samples" / "3.png")
        names = [str(path.relative_to(tmp_path)) for path, _ in list_samples(tmp_path)]
        assert names == ["00000/samples/00000.png", "00001/samples/00000.png", "7/samples/3.png"]

    def test_numbers_without_zeros_and_every_format(self, tmp_path: Path) -> None:
        for prompt in ("10", "9"):
            (tmp_path / prompt / "samples").mkdir(parents=True)
            (tmp_path / prompt / "metadata.jsonl").write_text(json.dumps(self.records[0]))
            for name in ("10.jpg", "9.WEBP"):
                IMAGE.save(tmp_path / prompt / "samples" / name)
        names = [str(path.relative_to(tmp_path)) for path, _ in list_samples(tmp_path)]
        assert names == [
            "9/samples/9.WEBP",
            "9/samples/10.jpg",
            "10/samples/9.WEBP",
            "10/samples/10.jpg",
        ]
        write_grids(tmp_path)
        assert (tmp_path / "9" / "grid.png").is_file()
        IMAGE.save(tmp_path / "9" / "samples" / "010.png")
        with pytest.raises(
            ValueError, match=r"010\.png and .*10\.jpg are both sample 10: keep one"
        ):
            list(list_samples(tmp_path))

    def test_another_benchmark_is_refused(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        write_prompts(tmp_path, self.records)  # the same again is fine
        with pytest.raises(ValueError, match="belongs to another benchmark"):
            write_prompts(tmp_path, self.records[::-1])

    def test_empty_and_broken_folders(self, tmp_path: Path) -> None:
        detector = FakeDetector(at("cat", 20, 20))
        with pytest.raises(ValueError, match="holds no images"):
            score_folder(tmp_path, detector, FakeColors(), known=self.known())
        self.fill(tmp_path)
        cut, broken = sample_path(tmp_path, 1, 1), dict[str, str]()
        cut.write_bytes(cut.read_bytes()[:40])
        rows = score_folder(tmp_path, detector, FakeColors(), known=self.known(), broken=broken)
        assert (len(rows), list(broken)) == (3, [str(cut)])
        assert "not a readable image" in broken[str(cut)]
        for path, _ in list_samples(tmp_path):
            path.write_bytes(b"")
        with pytest.raises(
            ValueError, match=r"none of 4 images can be read; the first: .*00000\.png"
        ):
            score_folder(tmp_path, detector, FakeColors(), known=self.known())
        (tmp_path / "00000" / "metadata.jsonl").write_text("{")
        with pytest.raises(ValueError, match="not valid JSON"):
            score_folder(tmp_path, detector, FakeColors(), known=self.known())

    def test_an_interrupted_run_scores_only_the_rest(self, tmp_path: Path) -> None:
        self.fill(tmp_path / "p")

        class Counting(FakeDetector):
            seen = 0

            def detect(self, image: Image.Image) -> list[Detection]:
                self.seen += 1
                if self.seen > 3:
                    raise KeyboardInterrupt
                return super().detect(image)

        options = {"known": self.known(), "kept": tmp_path / "rows", "identity": {"detector": "1"}}
        with pytest.raises(KeyboardInterrupt):  # the test of its sight, two images, the third
            score_folder(tmp_path / "p", Counting(at("cat", 20, 20)), FakeColors(), **options)
        second = Counting(at("cat", 60, 60))
        rows = score_folder(tmp_path / "p", second, FakeColors(), **options)
        assert second.seen == 3
        assert [json.loads(row["details"])["cat"][0][0] for row in rows] == [15, 15, 55, 55]
        assert [row["filename"] for row in rows] == [
            str(path) for path, _ in list_samples(tmp_path / "p")
        ]
        Image.new("RGB", (8, 8), "red").save(sample_path(tmp_path / "p", 0, 0))
        third = Counting(at("cat", 60, 60))
        score_folder(tmp_path / "p", third, FakeColors(), **options)
        assert third.seen == 2  # a new image is scored, and so are all by other weights
        with pytest.raises(KeyboardInterrupt):
            score_folder(
                tmp_path / "p",
                Counting(at("cat", 1, 1)),
                FakeColors(),
                **options | {"identity": {"detector": "2"}},
            )

    def test_blind_detector_is_refused(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        with pytest.raises(
            RuntimeError, match=r"fake fails on a known image.*expected cat>=1, found 0"
        ):
            score_folder(tmp_path, FakeDetector(), FakeColors(), known=self.known())
        require_sight(FakeDetector(at("cat", 20, 20)), FakeColors(), self.known())


class TestSummary:
    def test_overall_is_the_unweighted_mean_of_tasks(self) -> None:
        rows = [
            {"tag": "colors", "correct": c, "metadata": m}
            for c, m in [(True, "a"), (False, "a"), (False, "b"), (False, "b")]
        ]
        rows += [{"tag": "position", "correct": True, "metadata": "c"}]
        summary = summarize(rows)
        assert (summary["colors"], summary["position"], summary["overall"]) == (0.25, 1.0, 0.625)
        assert summary["correct_images"] == 0.4
        assert summary["correct_prompts"] == pytest.approx(2 / 3)
        assert (summary["num_images"], summary["num_prompts"]) == (5, 3)

    def test_no_rows(self) -> None:
        with pytest.raises(ValueError, match="no results"):
            summarize([])

    def test_intervals_take_prompts_as_trials(self) -> None:
        """Four images of each of ten prompts, all alike within a prompt, are ten observations."""
        rows = [
            {"tag": "colors", "correct": p < 5, "metadata": str(p)}
            for p in range(10)
            for _ in range(4)
        ]
        summary = summarize(rows)
        assert summary["intervals"]["colors"] == wilson_interval(5, 10)
        assert summary["intervals"]["overall"] == pytest.approx(wilson_interval(5, 10))
        assert "Wilson with prompts as trials" in summary["interval_method"]

    def test_overall_is_surer_than_a_task_and_never_certain(self) -> None:
        tags = ("colors", "position", "counting", "two_object")
        rows = [
            {"tag": tag, "correct": True, "metadata": f"{tag}{i}"}
            for tag in tags
            for i in range(10)
        ]
        low, high = summarize(rows)["intervals"]["overall"]
        assert (low, high) == (
            pytest.approx(1 - (1 - wilson_interval(10, 10)[0]) / 2),
            1,
        )  # sqrt(4) / 4

    def test_wilson_interval(self) -> None:
        low, high = wilson_interval(5, 10)
        assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
        assert wilson_interval(0, 10)[0] == 0
        assert wilson_interval(10, 10)[1] == 1


class TestCommand:
    """Anybody's folder, scored with the scene detector; the detectors of COCO need weights."""

    def folder(self, tmp_path: Path, per_prompt: int = 2) -> Path:
        benchmark = SceneBenchmark(per_family=2, images_per_prompt=1)
        write_prompts(tmp_path / "p", benchmark.records)
        images = satisfying_images(
            benchmark.records, benchmark.sprites, image_size=64, per_prompt=per_prompt
        )
        for i, (image, _) in enumerate(images):
            path = sample_path(tmp_path / "p", i // per_prompt, i % per_prompt)
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        return tmp_path / "p"

    def test_scores_and_manifest(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = self.folder(tmp_path)
        sample_path(folder, 3, 1).write_bytes(sample_path(folder, 3, 1).read_bytes()[:-30])
        evaluate.main(
            [
                f"images={folder}",
                f"out={tmp_path / 'o'}",
                "detector=scenes",
                "captions=scenes",
                "num_captions=50",
            ]
        )
        values = json.loads((tmp_path / "o" / "scores.json").read_text())
        assert (values["benchmark"], values["overall"], values["num_images"]) == (
            "GenEval-scenes",
            1,
            23,
        )
        assert values["incomplete"] == ["00003 has 1 of 2 images"]
        assert list(values["broken"]) == [str(sample_path(folder, 3, 1))]
        assert values["manifest"]["detector"] == "scene-detector(shapes)"
        assert values["manifest"]["suite"].startswith("md5:")
        assert values["leakage"]["num_captions"] == 50
        assert len((tmp_path / "o" / "results.jsonl").read_text().splitlines()) == 23
        out = capsys.readouterr().out
        assert "INCOMPLETE: 1 prompts" in out
        assert "BROKEN: 1 images are not in the score; " in out

    def test_classes_that_the_detector_does_not_know_are_refused(self, tmp_path: Path) -> None:
        write_prompts(tmp_path / "p", official_prompts()[:3])
        with pytest.raises(ValueError, match=r"detector scene-detector\(shapes\) does not know"):
            evaluate.main([f"images={tmp_path / 'p'}", f"out={tmp_path}", "detector=scenes"])

    def test_missing_weights_end_before_anything_is_drawn(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(SystemExit):
            evaluate.main(["model=nowhere", f"out={tmp_path / 'o'}"])
        assert "743b7d99.pth" in capsys.readouterr().err
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize(
        "arguments",
        [[], ["model=m", "images=."], ["images=nowhere"], ["model=m", "detector=scenes"]],
    )
    def test_what_cannot_be_meant(self, arguments: list[str]) -> None:
        with pytest.raises(ConfigError):
            evaluate.main(["out=o", *arguments])

    def test_grids(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, per_prompt=4)
        write_grids(folder)
        with Image.open(folder / "00000" / "grid.png") as grid:
            assert grid.size == (128, 128)
        assert len(list(list_samples(folder))) == 48


class TestSight:
    def test_a_classifier_that_names_one_colour_is_reported(self) -> None:
        class OneColor:
            def classify(
                self, image: Image.Image, detections: Sequence[Detection], class_name: str
            ) -> list[str]:
                return ["red"] * len(detections)

        mistaken = mistaken_colors(OneColor())
        assert mistaken == dict.fromkeys(("yellow", "green", "blue", "black", "white"), "red")
        found = {"num_broken": 0, "incomplete": [], "mistaken_colors": mistaken}
        text = evaluate.text_table(
            {"benchmark": "GenEval", "manifest": {"detector": "d", "suite": "official"}, **found}
        )
        assert "WARNING: the colour classifier fails on plain balls: {'yellow': 'red'" in text

    def test_a_classifier_that_sees_passes(self) -> None:
        """The nearest of the ten colours at the centre of the crop."""

        class Nearest:
            def classify(
                self, image: Image.Image, detections: Sequence[Detection], class_name: str
            ) -> list[str]:
                pixel = np.array(crop_object(image, detections[0]).getpixel((80, 80))) / 255
                return [
                    min(
                        COLOR_VALUES,
                        key=lambda name: float(
                            np.square(np.array(COLOR_VALUES[name]) - pixel).sum()
                        ),
                    )
                ]

        assert mistaken_colors(Nearest()) == {}

    def test_the_photograph_is_one_of_a_person(self) -> None:
        with Image.open(sample_photograph()) as image:
            assert min(image.size) > 400
