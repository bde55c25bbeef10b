"""The generation benchmark: true scenes reach the ceiling, drawing resumes, held-out prompts are scored apart."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vqrae.common.images import image_to_tensor
from vqrae.data.scenes.language import FAMILIES, benchmark_prompts
from vqrae.data.scenes.scene import COLORS, SceneSampler
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.drawing import claim_folder
from vqrae.eval.geneval import list_samples, sample_path
from vqrae.eval.geneval import scenes as generation
from vqrae.eval.geneval.scenes import (
    SceneBenchmark,
    holds_held_out,
    reconstruct,
    satisfying_images,
    satisfying_scene,
    scene_scores,
)
from vqrae.generation.sampling import SamplingConfig
from vqrae.tokenizer.modeling import VQRAEModel

NAMES = load_sprites("shapes").names
SAMPLING = SamplingConfig(guidance_scale=1.0)


class PerfectGenerator:
    """Draws a true scene for every prompt of a benchmark, and remembers what it drew."""

    def __init__(self, benchmark: SceneBenchmark, tokenizer: VQRAEModel) -> None:
        drawn = satisfying_images(benchmark.records, benchmark.sprites, image_size=64, per_prompt=1)
        self.by_prompt = {record["prompt"]: image_to_tensor(image) for image, record in drawn}
        self.tokenizer = tokenizer
        self.drawn: list[tuple[str, int]] = []

    def images(self, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> Tensor:
        self.drawn += zip(prompts, seeds, strict=True)
        return torch.stack([self.by_prompt[prompt] for prompt in prompts])


@pytest.mark.parametrize("sprites", ["shapes", "emoji"])
def test_true_scenes_reach_the_ceiling(sprites: str) -> None:
    benchmark = SceneBenchmark(sprites, per_family=12, images_per_prompt=1)
    scores = benchmark.score_images(
        satisfying_images(benchmark.records, benchmark.sprites, image_size=64, per_prompt=1)
    )
    assert scores["overall"] == 1
    assert {family: scores[family] for family in FAMILIES} == dict.fromkeys(FAMILIES, 1)
    assert scores["held_out"]["overall"] == scores["seen"]["overall"] == 1
    assert scores["held_out"]["num_images"] == scores["seen"]["num_images"] == 18


def contradictions(record: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Records of the same task that no image satisfies which satisfies this one and holds nothing else."""
    asked = [clause["class"] for clause in record["include"]]
    absent = next(name for name in names if name not in asked)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def changed(index: int, **values: Any) -> dict[str, Any]:
        include = [
            {**clause, **values} if i == index else clause
            for i, clause in enumerate(record["include"])
        ]
        return {**record, "include": include}

    first = record["include"][0]
    match record["tag"]:
        case "single_object" | "two_object":
            return [changed(i, **{"class": absent}) for i in range(len(asked))]
        case "counting":
            less, count = {**changed(0, count=first["count"] - 1)}, first["count"]
            less["exclude"] = [{"class": first["class"], "count": count}]
            return [changed(0, count=count + 1), less]
        case "position":
            return [changed(1, position=[opposite[record["include"][1]["position"][0]], 0])]
        case _:  # colors, color_attr
            wrong = [
                next(c for c in COLORS if c not in {x["color"] for x in record["include"]})
            ] * len(asked)
            swapped = [clause["color"] for clause in record["include"]][::-1]
            return [changed(i, color=c) for i, c in enumerate(wrong)] + (
                [changed(0, color=swapped[0])] if asked[1:] else []
            )


@pytest.mark.parametrize("sprites", ["shapes", "emoji"])
def test_true_scenes_fail_every_prompt_that_contradicts_them(sprites: str) -> None:
    benchmark = SceneBenchmark(sprites, per_family=12, images_per_prompt=1)
    images = satisfying_images(benchmark.records, benchmark.sprites, image_size=64, per_prompt=1)
    pairs = [
        (p, other)
        for p, record in images
        for other in contradictions(record, benchmark.sprites.names)
    ]
    scores = benchmark.score_images(pairs)
    assert {family: scores[family] for family in FAMILIES} == dict.fromkeys(FAMILIES, 0)
    assert scores["num_images"] == len(pairs) == 12 * (1 + 2 + 2 + 1 + 1 + 3)


def test_images_of_other_prompts_fail() -> None:
    benchmark = SceneBenchmark(per_family=12, images_per_prompt=1)
    images = satisfying_images(benchmark.records, benchmark.sprites, image_size=64, per_prompt=1)
    shuffled = [
        (image, record)
        for (image, _), (_, record) in zip(images, images[7:] + images[:7], strict=True)
    ]
    assert benchmark.score_images(shuffled)["overall"] < 0.25


def test_satisfying_scenes_hold_what_is_asked_and_vary_in_the_rest() -> None:
    sampler = SceneSampler(load_sprites("shapes"))
    for record in benchmark_prompts(NAMES, 8):
        scenes = [
            satisfying_scene(record, sampler, np.random.default_rng(seed)) for seed in range(6)
        ]
        for scene in scenes:
            names = [NAMES[item.name] for item in scene.objects]
            assert sorted(names) == sorted(
                c["class"] for c in record["include"] for _ in range(c["count"])
            )
        assert len({scene.background for scene in scenes}) > 3
        if record["tag"] == "two_object":
            assert len({scene.objects[0].color for scene in scenes}) > 1


def test_held_out_prompts() -> None:
    def color(name: str, value: str) -> dict[str, Any]:
        return {"include": [{"class": name, "count": 1, "color": value}]}

    def position(a: str, where: str, b: str) -> dict[str, Any]:
        return {
            "include": [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [where, 0]}]
        }

    assert holds_held_out(color("circle", "red"), NAMES)  # (3 * 0 + 0) % 10
    assert not holds_held_out(color("circle", "blue"), NAMES)
    assert holds_held_out(position("square", "left of", "square"), NAMES) is False
    assert holds_held_out(position("square", "left of", "star"), NAMES) == holds_held_out(
        position("star", "right of", "square"), NAMES
    )
    counts = {
        tag: sum(holds_held_out(r, NAMES) for r in benchmark_prompts(NAMES, 10) if r["tag"] == tag)
        for tag in FAMILIES
    }
    assert counts == {
        "single_object": 0,
        "two_object": 0,
        "counting": 0,
        "colors": 5,
        "position": 5,
        "color_attr": 5,
    }


def test_scores_of_new_and_old_combinations() -> None:
    records = [
        record for record in benchmark_prompts(NAMES, 10) if record["tag"] in generation.COMPOSING
    ]
    rows = [
        {
            "tag": r["tag"],
            "prompt": r["prompt"],
            "metadata": json.dumps(r),
            "correct": not holds_held_out(r, NAMES),
        }
        for r in records
    ]
    scores = scene_scores(rows, records, NAMES)
    assert scores["overall"] == 0.5
    assert scores["held_out"] == {
        "overall": 0,
        "colors": 0,
        "position": 0,
        "color_attr": 0,
        "num_images": 15,
    }
    assert scores["seen"]["overall"] == 1


class TestDrawing:
    def benchmark(self) -> SceneBenchmark:
        return SceneBenchmark(per_family=2, images_per_prompt=2)

    def test_existing_images_are_kept(self, tmp_path: Path, tokenizer_folder: Path) -> None:
        benchmark = self.benchmark()
        generator = PerfectGenerator(benchmark, VQRAEModel.from_pretrained(tokenizer_folder))
        calls: list[tuple[int, int]] = []
        for _ in range(2):
            benchmark.draw(
                generator,  # type: ignore[arg-type]
                tmp_path,
                settings={"generator": "a"},
                sampling=SAMPLING,
                batch_size=5,
                progress=lambda *call: calls.append(call),
            )
        assert len(generator.drawn) == 24 == len({seed for _, seed in generator.drawn})
        assert calls[-1] == (24, 24)
        sample_path(tmp_path, 3, 1).unlink()
        benchmark.draw(generator, tmp_path, settings={"generator": "a"}, sampling=SAMPLING)  # type: ignore[arg-type]
        assert generator.drawn[24:] == [(benchmark.records[3]["prompt"], 30_001)]
        assert len(list(list_samples(tmp_path))) == 24
        scores, rows = benchmark.score_folder(tmp_path)
        assert scores["overall"] == 1
        assert len(rows) == 24

    def test_a_folder_that_another_process_draws_into_is_refused(self, tmp_path: Path) -> None:
        held = "hold(pathlib.Path(sys.argv[1]), '')"
        code = f"import pathlib, sys; from vqrae.common.run import hold; {held}; print(flush=True); input()"
        process = [sys.executable, "-c", code, str(tmp_path / ".lock")]
        with subprocess.Popen(
            process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "\n"
            with pytest.raises(
                ValueError, match=rf"{tmp_path} is in use by process {other.pid} on"
            ):
                claim_folder(tmp_path, {"generator": "a"})
            other.kill()
        claim_folder(tmp_path, {"generator": "a"})
        claim_folder(tmp_path, {"generator": "b"})  # nothing was drawn

    def test_other_settings_are_refused(self, tmp_path: Path, tokenizer_folder: Path) -> None:
        benchmark = self.benchmark()
        generator = PerfectGenerator(benchmark, VQRAEModel.from_pretrained(tokenizer_folder))
        benchmark.draw(generator, tmp_path, settings={"generator": "a"}, sampling=SAMPLING)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="set images= to a new folder"):
            benchmark.draw(generator, tmp_path, settings={"generator": "b"}, sampling=SAMPLING)  # type: ignore[arg-type]


def test_reconstruction_matches_the_tokenizer(tokenizer_folder: Path) -> None:
    tokenizer = VQRAEModel.from_pretrained(tokenizer_folder).eval()
    benchmark = SceneBenchmark(per_family=1, images_per_prompt=1)
    images = [
        p
        for p, _ in satisfying_images(
            benchmark.records, benchmark.sprites, image_size=64, per_prompt=1
        )
    ]
    copies = reconstruct(images, tokenizer)
    assert len(copies) == len(images)
    with torch.inference_mode():
        expected = tokenizer(image_to_tensor(images[5])[None]).reconstruction[0]
    assert (image_to_tensor(copies[5]) - expected).abs().max() < 1 / 255


def test_command(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "per_family=2",
        "images_per_prompt=1",
        f"output={tmp_path / 'generation.json'}",
        "sampling.top_k=3",
    ]
    generator = PerfectGenerator(
        SceneBenchmark(per_family=2, images_per_prompt=1),
        VQRAEModel.from_pretrained(tokenizer_folder).eval(),
    )
    monkeypatch.setattr(generation.Generator, "from_pretrained", lambda *args, **options: generator)
    generation.main([f"model={tokenizer_folder}", *arguments])
    values = json.loads((tmp_path / "generation.json").read_text())
    assert values["overall"] == 1
    assert values["ceiling"]["truth"]["overall"] == 1
    assert 0 <= values["ceiling"]["reconstruction"]["overall"] <= 1
    assert values["sampling"]["top_k"] == 3
    assert len((tmp_path / "generation.jsonl").read_text().splitlines()) == 12
    assert sample_path(tmp_path / "images", 11, 0).is_file()
    assert "overall" in capsys.readouterr().out
