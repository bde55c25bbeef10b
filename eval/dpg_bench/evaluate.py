"""DPG-Bench: draw images of its prompts, or take anybody's, and let a judge answer its questions about them.

    python -m vqrae.eval.dpg_bench.evaluate model=runs/generation out=dpg
    python -m vqrae.eval.dpg_bench.evaluate images=GRIDS images_per_prompt=4 questions=dpg_bench.csv judge=mplug out=dpg

Without a table, prompts and questions are made from the embedded scenes, and the scene detector answers them.

    OUT/images/ITEM.png       grids that were drawn; OUT/singles/ITEM/0.png …, the images in them
    OUT/answers/ITEM.json       what the judge said, kept: an interrupted run asks only the rest
    OUT/scores.json             scores, counts, failures, manifest
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.cli import parse, progress_line
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, sha256, write_json
from vqrae.common.images import open_image, save_image, tile
from vqrae.common.run import hold, quiet_libraries
from vqrae.eval.dpg_bench.grids import find_images, split_grid
from vqrae.eval.dpg_bench.judges import VQA, JudgeName, ask_what_is_known, build_judge
from vqrae.eval.dpg_bench.questions import Item, read_questions, write_questions
from vqrae.eval.dpg_bench.scenes import scene_items, true_images
from vqrae.eval.dpg_bench.scores import Answers, official_scores, summarize
from vqrae.eval.generated import (
    ImageRequest,
    ImagesConfig,
    claim_folder,
    generate_missing,
    image_seed,
)
from vqrae.eval.manifest import score_manifest
from vqrae.eval.sharding import gather, processes, progress_of_main, stride

Outcome = tuple[str, list[list[str]] | None, str]
"""Item id, its answers, or None and the reason."""


@dataclass(frozen=True, kw_only=True)
class DPGConfig(ImagesConfig):
    """Score images of dense prompts by questions about them; `images` holds ITEM.png for every item: one, or a 2 x 2 grid."""

    out: str
    """Folder of everything that is written."""
    questions: str = "scenes"
    """DPG-Bench's table (dpg_bench.csv), or scenes: prompts and questions about embedded scenes."""
    num_prompts: int | None = None
    """The first so many of the table; 50 of scenes when not given."""
    images_per_prompt: int | None = None
    """Images in a file: 1, or those of a 2 x 2 grid; 4 are drawn. Given images= need this or `resolution`."""
    resolution: int | None = None
    """Pixels of an image's side that grids must have; any size when not given."""
    judge: JudgeName = "scenes"
    """What answers: mplug, vqa, chat, endpoint, understanding, scenes."""
    judge_model: str | None = None
    """Its weights: folder or hub id; what an endpoint calls its model."""
    judge_url: str | None = None
    """Of an endpoint, such as http://localhost:8000/v1."""
    official_compat: bool = False
    """Score by the formulas of the published script, faults included, for comparison with old numbers."""
    sprites: str = "shapes"
    """What scenes are made of: shapes or emoji."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judge == "scenes" and self.questions != "scenes":
            raise ValueError(
                f"judge=scenes cannot answer the questions of {self.questions}: give judge=mplug or another"
            )
        if not 1 <= self.images_in_a_file <= 4:
            raise ValueError(
                f"got images_per_prompt={self.images_per_prompt}, expected 1, 2, 3 or 4"
            )
        if self.images is not None and self.images_per_prompt is None and self.resolution is None:
            raise ValueError(
                f"are the files of images={self.images} single images or grids? Set images_per_prompt=1, or "
                "images_per_prompt=4 for grids of 2 x 2, or resolution= to the pixels of one image's side in a grid"
            )

    @property
    def images_in_a_file(self) -> int:
        """`images_per_prompt`, or the benchmark's own number."""
        return 4 if self.images_per_prompt is None else self.images_per_prompt


def load_items(config: DPGConfig) -> tuple[list[Item], list[str]]:
    """Prompts with their questions, and what is odd about the table."""
    if config.questions == "scenes":
        return scene_items(config.sprites, config.num_prompts or 50), []
    problems: list[str] = []
    return read_questions(config.questions, problems)[: config.num_prompts], problems


# ---- drawing


def draw_grids(config: DPGConfig, items: Sequence[Item], out: Path, device: str) -> None:
    """Draw the images that `out` lacks, and lay them out."""
    asked = {
        "prompts": [item.prompt for item in items],
        "images_per_prompt": config.images_in_a_file,
    }
    claim_folder(out / "singles", {**config.generation_settings(), **asked}, "out")
    places = [
        [out / "singles" / item.id / f"{i}.png" for i in range(config.images_in_a_file)]
        for item in items
    ]
    orders = [
        ImageRequest(item.prompt, image_seed(number, sample), path)
        for number, (item, paths) in enumerate(zip(items, places, strict=True))
        for sample, path in enumerate(paths)
    ]
    progress = progress_of_main("images")
    generator = config.load_generator(device)
    generate_missing(
        generator, orders, sampling=config.sampling, batch_size=config.batch_size, progress=progress
    )
    if is_main_process():
        for item, paths in zip(items, places, strict=True):
            images = [open_image(path) for path in paths]
            grid = images[0] if len(images) == 1 else tile(images + images[:1] * (4 - len(images)))
            save_image(grid, out / "images" / f"{item.id}.png")
    gather([])


# ---- judging


def judge_item(
    item: Item, image: Path | None, judge: VQA, config: DPGConfig, kept: Path
) -> Outcome:
    """A judge's answers about one prompt's images, from `kept` when the image is still the same."""
    if image is None:
        return item.id, None, "no image"
    identity = sha256(image)
    if kept.is_file() and (stored := read_json(kept))["image"] == identity:
        return item.id, stored["answers"], ""
    try:
        crops = split_grid(image, config.images_in_a_file, config.resolution)
        pairs = [(crop, question.text) for crop in crops for question in item.questions]
        said = iter(judge.answer(pairs))
    except (ValueError, RuntimeError, OSError) as error:
        return item.id, None, f"{type(error).__name__}: {error}"
    answers = [list(itertools.islice(said, len(item.questions))) for _ in crops]
    write_json(kept, {"image": identity, "answers": answers})
    return item.id, answers, ""


def judge_folder(
    items: Sequence[Item],
    folder: Path,
    judge: VQA,
    config: DPGConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Answers], dict[str, str]]:
    """Answers by item, and the reason for each item that has none; several processes share the work, all get everything."""
    images, kept = find_images(folder), Path(config.out) / "answers"
    asked = [[item.id, [question.text for question in item.questions]] for item in items]
    settings = {
        "judge": judge.name,
        "identity": judge.identity,
        "questions": asked,
        "images_per_prompt": config.images_in_a_file,
        "resolution": config.resolution,
    }
    claim_folder(kept, settings, "out")
    mine = stride(items)
    outcomes: list[Outcome] = []
    for done, item in enumerate(mine, start=1):
        outcomes.append(
            judge_item(item, images.get(item.id), judge, config, kept / f"{item.id}.json")
        )
        if progress is not None:
            progress(done, len(mine))
    everything = {name: (given, reason) for name, given, reason in gather(outcomes)}
    in_order = [(item.id, *everything[item.id]) for item in items]
    answers: dict[str, Answers] = {name: given for name, given, _ in in_order if given is not None}
    return answers, {name: reason for name, given, reason in in_order if given is None}


def scene_ceiling(judge: VQA, items: Sequence[Item], sprites: str) -> float:
    """What true scenes score: the part that the judge itself loses."""
    answers = {}
    for item, image in zip(items, true_images(sprites, len(items)), strict=True):
        answers[item.id] = [judge.answer([(image, question.text) for question in item.questions])]
    return float(summarize(items, answers)["dpg"])


def main(argv: list[str] | None = None) -> None:
    config = parse(DPGConfig, argv)
    quiet_libraries()
    out, (items, problems) = Path(config.out), load_items(config)
    if is_main_process():
        out.mkdir(parents=True, exist_ok=True)
        hold(out / ".lock", str(out))
    with processes(config.device) as device:
        judge = build_judge(
            config.judge,
            model=config.judge_model,
            url=config.judge_url,
            sprites=config.sprites,
            device=device,
        )
        known = ask_what_is_known(judge) if is_main_process() else {}
        folder = Path(config.images) if config.images is not None else out / "images"
        if config.images is None:
            draw_grids(config, items, out, device)
        progress = progress_line("answers") if is_main_process() else None
        answers, failed = judge_folder(items, folder, judge, config, progress=progress)
    if not is_main_process():
        return
    if config.questions == "scenes":
        write_questions(out / "questions.csv", items)
    if not answers:
        raise SystemExit(
            f"none of {len(items)} prompts could be judged; the first: {next(iter(failed.items()))}"
        )
    result = (official_scores if config.official_compat else summarize)(items, answers)
    drawn = out / "singles" / "settings.json"
    values = {
        "benchmark": f"DPG{'-official' if config.official_compat else ''}({judge.name})",
        **result,
        "num_failed": len(failed),
        "failed": failed,
        **(
            {"ceiling": {"truth": scene_ceiling(judge, items, config.sprites)}}
            if config.questions == "scenes"
            else {}
        ),
        "self_test": known,
        "table_problems": problems,
        "manifest": score_manifest(
            judge=judge.name,
            weights=judge.identity,
            formulas="published script" if config.official_compat else "corrected",
            questions=config.questions
            if config.questions == "scenes"
            else sha256(Path(config.questions)),
            images=read_json(drawn) if config.images is None else {"folder": str(folder)},
        ),
    }
    values["manifest"]["images"].pop("prompts", None)
    write_json(out / "scores.json", values)
    print(text_table(values))
    print(f"{values['num_scored']} prompts of {folder}  ->  {out / 'scores.json'}")


def text_table(values: dict[str, Any]) -> str:
    """The scores for people, and everything that is not as it should be."""
    low, high = values["interval"]
    lines = [f"{values['benchmark']}  {values['dpg']:.2f}   [{low:.2f}, {high:.2f}]"]
    lines += [f"  {name:<14}{value:>8.2f}" for name, value in values["categories"].items()]
    if "ceiling" in values:
        lines.append(f"  true scenes   {values['ceiling']['truth']:>8.2f}")
    if values["num_failed"]:
        name, reason = next(iter(values["failed"].items()))
        lines.append(
            f"FAILED: {values['num_failed']} of {values['num_prompts']} prompts are not in the score; {name}: {reason}"
        )
    if values.get("dropped"):
        lines.append(f"dropped by the published formulas: {', '.join(values['dropped'])}")
    if values["table_problems"]:
        lines.append(
            f"{len(values['table_problems'])} problems with the table, such as {values['table_problems'][0]}"
        )
    if values["unclear_answers"]:
        lines.append(f"{values['unclear_answers']} answers are neither yes nor no and count as no")
    if not values["self_test"]["passed"]:
        lines.append(
            f"WARNING: the judge does not tell a red disc from a blue one: {values['self_test']['answers']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
