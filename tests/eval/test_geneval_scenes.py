"""GenEval over scenes: true scenes score 1, generation resumes, held-out prompts count apart."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import locked
from torch import Tensor

from vqrae.common.images import image_to_tensor
from vqrae.data.scenes.language import FAMILIES, benchmark_prompts
from vqrae.data.scenes.scene import COLORS
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.generated import claim_folder, generate_missing
from vqrae.eval.geneval import evaluate
from vqrae.eval.geneval.folders import image_requests, sample_path
from vqrae.eval.geneval.judges import scene_judges
from vqrae.eval.geneval.scenes import (
    COMPOSING,
    holds_held_out,
    reconstruct,
    satisfying_images,
    scene_scores,
    score_images,
)
from vqrae.generation.generator import Generator
from vqrae.tokenizer.modeling import VQRAEModel

SHAPES = load_sprites("shapes")
NAMES = SHAPES.names


def silent(done: int, total: int) -> None:
    pass


def scored(sprites: str, images: Sequence[Any], records: Sequence[Any]) -> dict[str, Any]:
    rows = score_images(images, scene_judges(sprites))
    return scene_scores(rows, records, load_sprites(sprites).names)


def contradictions(record: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Records of the same task that no true image of this one satisfies."""
    asked = [clause["class"] for clause in record["include"]]
    absent = next(name for name in names if name not in asked)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def changed(index: int, **values: Any) -> dict[str, Any]:
        include = [dict(clause) for clause in record["include"]]
        include[index] |= values
        return {**record, "include": include}

    first = record["include"][0]
    match record["tag"]:
        case "single_object" | "two_object":
            return [changed(i, **{"class": absent}) for i in range(len(asked))]
        case "counting":
            fewer = [{"class": first["class"], "count": first["count"]}]
            less = {**changed(0, count=first["count"] - 1), "exclude": fewer}
            return [changed(0, count=first["count"] + 1), less]
        case "position":
            return [changed(1, position=[opposite[record["include"][1]["position"][0]], 0])]
        case _:  # colors, color_attr
            colors = [clause["color"] for clause in record["include"]]
            wrong = next(color for color in COLORS if color not in colors)
            swapped = [changed(0, color=colors[1])] if asked[1:] else []
            return [changed(i, color=wrong) for i in range(len(asked))] + swapped


@pytest.mark.parametrize("sprites", ["shapes", "emoji"])
def test_true_scenes_satisfy_their_prompts_and_no_others(sprites: str) -> None:
    loaded = load_sprites(sprites)
    records = benchmark_prompts(loaded.names, 4)
    images = satisfying_images(records, loaded, image_size=64, per_prompt=1)
    scores = scored(sprites, images, records)
    assert {family: scores[family] for family in FAMILIES} == dict.fromkeys(FAMILIES, 1)
    assert scores["held_out"]["overall"] == scores["seen"]["overall"] == 1
    assert scores["held_out"]["num_images"] == scores["seen"]["num_images"] == 6
    pairs = []
    for image, record in images:
        pairs += [(image, other) for other in contradictions(record, loaded.names)]
    scores = scored(sprites, pairs, records)
    assert {family: scores[family] for family in FAMILIES} == dict.fromkeys(FAMILIES, 0)
    assert scores["num_images"] == 4 * (1 + 2 + 2 + 1 + 1 + 3)


def test_held_out_prompts_count_apart() -> None:
    def color(name: str, value: str) -> dict[str, Any]:
        return {"include": [{"class": name, "count": 1, "color": value}]}

    assert holds_held_out(color("circle", "red"), NAMES)  # (3 * 0 + 0) % 10
    assert not holds_held_out(color("circle", "blue"), NAMES)
    records = benchmark_prompts(NAMES, 10)
    new = [record["tag"] for record in records if holds_held_out(record, NAMES)]
    assert {tag: new.count(tag) for tag in set(new)} == dict.fromkeys(COMPOSING, 5)
    rows = []
    for record in records:
        right = not holds_held_out(record, NAMES)
        rows.append({**record, "metadata": json.dumps(record), "correct": right})
    scores = scene_scores(rows, records, NAMES)
    assert scores["held_out"] == {"overall": 0, **dict.fromkeys(COMPOSING, 0), "num_images": 15}
    assert (scores["seen"]["overall"], scores["colors"]) == (1, 0.5)


class PerfectGenerator:
    """Generates a true scene for every prompt, and remembers what it was asked."""

    def __init__(self, records: Sequence[Any], tokenizer: VQRAEModel | None = None) -> None:
        images = satisfying_images(records, SHAPES, image_size=64, per_prompt=1)
        self.by_prompt = {record["prompt"]: image_to_tensor(image) for image, record in images}
        self.tokenizer, self.asked = tokenizer, list[tuple[str, int]]()

    def images(self, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> Tensor:
        self.asked += zip(prompts, seeds, strict=True)
        return torch.stack([self.by_prompt[prompt] for prompt in prompts])


def test_existing_images_are_kept(tmp_path: Path) -> None:
    records = benchmark_prompts(NAMES, 2)
    generator: Any = PerfectGenerator(records)
    requests = image_requests(tmp_path, records, 2)
    calls: list[tuple[int, int]] = []
    for _ in range(2):
        generate_missing(generator, requests, batch_size=5, progress=lambda *c: calls.append(c))
    assert len(generator.asked) == 24 == len({seed for _, seed in generator.asked})
    assert calls[-1] == (24, 24)
    sample_path(tmp_path, 3, 1).unlink()
    generate_missing(generator, requests, progress=silent)
    assert generator.asked[24:] == [(records[3]["prompt"], 30_001)]


def test_a_folder_of_other_settings_or_in_use_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with locked(lock) as said, pytest.raises(ValueError, match=f"{tmp_path} {said}"):
        claim_folder(tmp_path, {"generator": "a"}, "images")
    claim_folder(tmp_path, {"generator": "a"}, "images")
    claim_folder(tmp_path, {"generator": "b"}, "images")  # nothing was generated
    (tmp_path / "00000").mkdir()
    with pytest.raises(ValueError, match=r"generator b -> c.*set images= to a new folder"):
        claim_folder(tmp_path, {"generator": "c"}, "images")


def test_reconstruction_is_the_tokenizers(tokenizer_folder: Path) -> None:
    tokenizer = VQRAEModel.from_pretrained(tokenizer_folder).eval()
    records = benchmark_prompts(NAMES, 1)
    pairs = satisfying_images(records, SHAPES, image_size=64, per_prompt=1)
    images = [image for image, _ in pairs]
    copies = reconstruct(images, tokenizer)
    with torch.inference_mode():
        expected = tokenizer(image_to_tensor(images[5])[None]).reconstruction[0]
    assert (image_to_tensor(copies[5]) - expected).abs().max() < 1 / 255


def test_command(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = VQRAEModel.from_pretrained(tokenizer_folder).eval()
    generator = PerfectGenerator(benchmark_prompts(NAMES, 2), tokenizer)
    monkeypatch.setattr(Generator, "from_pretrained", lambda *arguments, **options: generator)
    sizes = ["per_family=2", "images_per_prompt=1", "sampling.top_k=3"]
    output = tmp_path / "generation.json"
    evaluate.main([f"model={tokenizer_folder}", *sizes, f"output={output}"])
    values = json.loads(output.read_text())
    assert (values["overall"], values["ceiling"]["truth"]["overall"]) == (1, 1)
    assert 0 <= values["ceiling"]["reconstruction"]["overall"] <= 1
    assert values["sampling"]["top_k"] == 3
    assert values["manifest"]["suite"] == "scenes(shapes, 2 per family, seed 43)"
    assert len(output.with_suffix(".jsonl").read_text().splitlines()) == 12
    assert sample_path(tmp_path / "images", 11, 0).is_file()
    assert "overall" in capsys.readouterr().out
