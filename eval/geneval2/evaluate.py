"""GenEval 2 (Kamath et al., arXiv 2512.16853): a judge's probabilities for each atom of a prompt.

    python -m vqrae.eval.geneval2.evaluate model=runs/generation output=geneval2
    python -m vqrae.eval.geneval2.evaluate prompts=geneval2_data.jsonl model=runs/generation \\
        judge=chat judge_model=Qwen/Qwen3-VL-8B-Instruct output=geneval2

Without a prompt file, prompts are made from the embedded scenes, and the scene detector answers.

    OUTPUT/images/00000.png, images.json   what was generated; prompt -> file, as GenEval 2 has it
    OUTPUT/answers/00000.json              the judge's probabilities: a run that was interrupted, or
                                           whose judge failed, asks only the rest
    OUTPUT/scores.json, scores.md          scores by skill and by number of atoms, manifest
    OUTPUT/examples.png                    images from the best to the worst
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from scipy.stats import gmean

from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, read_json, sha256, write_json, write_text
from vqrae.common.images import (
    image_grid,
    image_to_tensor,
    open_image,
    resize_and_crop,
    save_image,
)
from vqrae.common.run import hold_folder, kept, quiet_libraries, run_manifest
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.eval.generated import ImageRequest, claim_folder, image_seed
from vqrae.eval.geneval.scenes import BATCH, reconstruct
from vqrae.eval.geneval2.prompts import GenEval2Item, read_prompts, write_prompts
from vqrae.eval.geneval2.scenes import scene_items
from vqrae.eval.geneval2.scores import summarize
from vqrae.eval.judges.answers import ask_all
from vqrae.eval.judges.judge import JudgedConfig, SoftJudge
from vqrae.eval.sharding import gather, processes
from vqrae.tokenizer.modeling import VQRAEModel

NUM_SCENES = 200
EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class GenEval2Config(JudgedConfig):
    """Score one image of each prompt by Soft-TIFA; `images` is a JSON file, prompt -> image."""

    prompts: str = "scenes"
    """GenEval 2's file (geneval2_data.jsonl), or scenes: prompts about 200 embedded scenes."""
    judge: Literal["chat", "endpoint", "scenes"] = "scenes"
    """What answers: chat, endpoint or scenes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_prompts", low=1)
        if self.judge == "scenes" and self.prompts != "scenes":
            raise ValueError(
                f"judge=scenes cannot answer the questions of {self.prompts}: give judge=chat "
                "judge_model=Qwen/Qwen3-VL-8B-Instruct, which the published numbers rest on"
            )

    def require_images(self, images: Path) -> None:
        if not images.is_file():
            raise ValueError(f"images={images} is not a file, expected JSON: prompt -> image file")

    @cached_property
    def items(self) -> list[GenEval2Item]:
        """The prompts."""
        if self.prompts == "scenes":
            return scene_items(self.sprites, self.num_prompts or NUM_SCENES)
        return read_prompts(self.prompts)[: self.num_prompts]


# ---- images


def given_images(file: Path, items: Sequence[GenEval2Item]) -> dict[str, Path | None]:
    """Image files by item id, of a JSON file as GenEval 2 takes it; None where there is none.

    Paths are relative to where the command runs, or else to the file.
    """
    paths = read_json(file)
    if not isinstance(paths, dict):
        raise ValueError(f"{file} is not a JSON object: expected prompt -> image file")
    found: dict[str, Path | None] = {}
    for item in items:
        path = Path(str(paths.get(item.prompt, "")))
        places = [place for place in (path, file.parent / path) if place.is_file()]
        found[item.id] = places[0] if places else None
    if not any(found.values()):
        raise ValueError(f"{file} names no image of these {len(items)} prompts that exists")
    return found


def generated_images(
    config: GenEval2Config, device: str
) -> tuple[dict[str, Path | None], VQRAEModel]:
    """One image of each prompt: those that `output` lacks are generated. And the tokenizer."""
    output = Path(config.output)
    prompts = {"prompts": [item.prompt for item in config.items]}
    claim_folder(output / "images", {**config.generation_settings(), **prompts}, "output")
    generator = config.load_generator(device)
    paths = {item.id: output / "images" / f"{item.id}.png" for item in config.items}
    requests = []
    for number, item in enumerate(config.items):
        requests.append(ImageRequest(item.prompt, image_seed(number, 0), paths[item.id]))
    config.generate(generator, requests)
    if is_main_process():
        files = {item.prompt: str(paths[item.id].resolve()) for item in config.items}
        write_json(output / "images.json", files)
    return dict(paths), generator.tokenizer


def true_images(config: GenEval2Config, image_size: int = 64) -> dict[str, Image.Image]:
    """The scenes that the prompts describe, by item id."""
    scenes = SceneDataset("validation", sprites=config.sprites, image_size=image_size)
    return {item.id: Image.fromarray(scenes.pixels(int(item.id))) for item in config.items}


# ---- scores


def atom_scores(judge: SoftJudge, item: GenEval2Item, image: Image.Image) -> list[float]:
    """The probability of the right answer about each atom."""
    return judge.probabilities([(image, atom.question, atom.ways) for atom in item.atoms])


def score_images(
    config: GenEval2Config, judge: SoftJudge, images: dict[str, Path | None]
) -> dict[str, Any]:
    """Scores of image files, those of every atom, and the reason for each prompt without any."""
    items = {item.id: item for item in config.items}
    asked: dict[str, list[str]] = {}
    for item in config.items:
        asked[item.id] = [atom.question for atom in item.atoms]
    settings = {"judge": judge.name, "identity": judge.identity, "questions": asked}
    folder = Path(config.output) / "answers"
    claim_folder(folder, settings, "output")

    def ask(name: str, image: Path) -> list[float]:
        return atom_scores(judge, items[name], open_image(image))

    scores, failed = ask_all(images, ask, folder)
    if not scores:
        first = next(iter(failed.items()))
        raise SystemExit(f"none of {len(items)} prompts could be judged; the first: {first}")
    summary = summarize(config.items, scores)
    return {**summary, "num_failed": len(failed), "failed": failed, "atoms": scores}


def ceilings(
    config: GenEval2Config, judge: SoftJudge, tokenizer: VQRAEModel | None
) -> dict[str, Any]:
    """What scenes that satisfy the prompts score, and their reconstructions by the tokenizer."""
    size = 64 if tokenizer is None else tokenizer.config.image_size
    shown = {"truth": list(true_images(config, size).values())}
    if tokenizer is not None:
        truth, shown["reconstruction"] = shown["truth"], []
        for start in range(0, len(truth), BATCH):
            shown["reconstruction"] += reconstruct(truth[start : start + BATCH], tokenizer)
    found = {}
    for name, images in shown.items():
        scores = {}
        for item, image in zip(config.items, images, strict=True):
            scores[item.id] = atom_scores(judge, item, image)
        found[name] = summarize(config.items, scores)
    return found


def what_decides(config: GenEval2Config, judge: SoftJudge) -> dict[str, Any]:
    """The settings that decide the scores."""
    settings: dict[str, Any] = {"judge": judge.name, "weights": judge.identity}
    if config.prompts == "scenes":
        settings["prompts"] = f"scenes({config.sprites})"
    else:
        settings["prompts"] = sha256(Path(config.prompts))
    settings["num_prompts"] = len(config.items)
    if config.images is None:
        return settings | {"images": config.generation_settings()}
    found = given_images(Path(config.images), config.items)
    return settings | {"images": sha256(*(path for path in found.values() if path))}


def evaluate(config: GenEval2Config, judge: SoftJudge, device: str) -> dict[str, Any]:
    """The content of `scores.json`."""
    settings = what_decides(config, judge)

    def make() -> dict[str, Any]:
        tokenizer = None
        if config.images is None:
            images, tokenizer = generated_images(config, device)
        else:
            images = given_images(Path(config.images), config.items)
        scores = score_images(config, judge, images)
        is_scenes = config.prompts == "scenes"
        values = {"benchmark": f"GenEval2{'-scenes' if is_scenes else ''}({judge.name})", **scores}
        if is_scenes:
            values["ceiling"] = ceilings(config, judge, tokenizer)
        values["files"] = {name: str(path) for name, path in images.items() if path}
        return {**values, "manifest": {**run_manifest(), **settings}}

    file = Path(config.output) / "scores.json"
    if is_main_process() and file.is_file() and read_json(file).get("num_failed"):
        file.unlink()  # what failed is tried again
    gather([])  # the others look for the file after that
    return kept(file, settings, make)


# ---- for people


def score_table(values: dict[str, Any]) -> str:
    """Markdown: overall, by skill, by number of atoms; scenes and reconstructions alongside."""
    columns = [values, *values.get("ceiling", {}).values()]
    header = ["", "score", "95 % interval", "over", *values.get("ceiling", {})]
    rows = []
    for name, key in (("Soft-TIFA GM", "soft_tifa_gm"), ("Soft-TIFA AM", "soft_tifa_am")):
        low, high = values["intervals"][key]
        scores = [f"{column[key]:.1f}" for column in columns]
        over = _count(values["num_scored"], "prompts")
        rows.append([name, scores[0], f"{low:.1f} to {high:.1f}", over, *scores[1:]])
    for group, unit in (("skills", "atoms"), ("atom_counts", "prompts")):
        for name, value in values[group].items():
            low, high = value["interval"]
            scores = [f"{column[group][name]['score']:.1f}" for column in columns]
            label = f"{name}, AM" if unit == "atoms" else f"{name} atoms, GM"
            over = _count(value["number"], unit)
            rows.append([label, scores[0], f"{low:.1f} to {high:.1f}", over, *scores[1:]])
    lines = [f"# {values['benchmark']}", "", *markdown_table(header, rows), ""]
    if failed := values["failed"]:
        name, reason = next(iter(failed.items()))
        counts = f"{len(failed)} of {values['num_prompts']}"
        lines += [f"FAILED: {counts} prompts are not in the score; {name}: {reason}", ""]
    return "\n".join(lines)


def _count(number: int, unit: str) -> str:
    return f"{number} {unit if number != 1 else unit.removesuffix('s')}"


def draw_examples(values: dict[str, Any], items: Sequence[GenEval2Item]) -> Image.Image:
    """Images in equal steps from the best prompt to the worst, with GM and prompt."""
    score = {name: float(gmean(atoms)) for name, atoms in values["atoms"].items()}
    prompts = {item.id: item.prompt for item in items}
    ranked = sorted(score, key=lambda name: -score[name])
    steps = np.linspace(0, len(ranked) - 1, min(EXAMPLES, len(ranked))).round().astype(int)
    chosen = [ranked[step] for step in steps]
    rows, labels = [], []
    for name in chosen:
        image = resize_and_crop(open_image(values["files"][name]), 64)
        rows.append([image_to_tensor(image)])
        labels.append(f"{100 * score[name]:.0f}  {prompts[name]}")
    return image_grid(rows, labels=labels)


def main(argv: list[str] | None = None) -> None:
    config = parse(GenEval2Config, argv)
    quiet_libraries()
    output = Path(config.output)
    items = config.items  # a broken file should fail before models are loaded
    hold_folder(output)
    with processes(config.device) as device:
        judge = config.load_judge(device)
        assert isinstance(judge, SoftJudge)
        values = evaluate(config, judge, device)
    if is_main_process():
        if config.prompts == "scenes":
            write_prompts(output / "prompts.jsonl", items)
        table = score_table(values)
        write_text(output / "scores.md", table)
        save_image(draw_examples(values, items), output / "examples.png")
        print(f"{table}\n{values['num_scored']} prompts  ->  {output}")


if __name__ == "__main__":
    run_main(main)
