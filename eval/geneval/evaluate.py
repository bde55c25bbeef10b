"""GenEval: write its prompts, draw images of them, score them, or score images that anybody drew.

    python -m vqrae.eval.geneval.evaluate prompts_only=true out=geneval
    python -m vqrae.eval.geneval.evaluate model=runs/generation out=geneval
    python -m vqrae.eval.geneval.evaluate images=IMAGES out=geneval detector=transformers

Writes scores.json and results.jsonl (GenEval's own format) into `out`. The detector is tested before anything is drawn; its
rows are kept in `out`/rows, so that an interrupted run scores only the rest.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.cli import parse, progress_line
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, write_json, write_text
from vqrae.common.run import hold, quiet_libraries
from vqrae.data.scenes.language import FAMILIES
from vqrae.eval.drawing import ImagesConfig, claim_folder, draw_missing
from vqrae.eval.geneval.folders import (
    image_orders,
    read_prompts,
    score_folder,
    uneven_prompts,
    write_grids,
    write_prompts,
    write_rows,
)
from vqrae.eval.geneval.judges import DetectorName, Judges, build_judges, require_known_classes
from vqrae.eval.geneval.leakage import leakage_report, training_captions
from vqrae.eval.geneval.prompts import OFFICIAL_SEED, metadata_lines, official_prompts, suite_name
from vqrae.eval.geneval.scores import summarize
from vqrae.eval.manifest import score_manifest
from vqrae.eval.reconstruction.networks import NotMeasured
from vqrae.eval.sharding import processes


@dataclass(frozen=True, kw_only=True)
class GenEvalConfig(ImagesConfig):
    """GenEval with its own prompts, or on any folder of images in its layout."""

    prompts_only: bool = False
    """Write evaluation_metadata.jsonl, with captions= also leakage.json, and stop."""
    seed: int = OFFICIAL_SEED
    """Of the prompts: 43 gives the official 553, any other a fresh suite."""
    images_per_prompt: int = 4
    """Images that are drawn of each prompt; the official number is 4."""
    detector: DetectorName = "mmdet"
    """GenEval's own checkpoint, another one of transformers, or the rule-based one of the embedded scenes."""
    weights: str | None = None
    """The detector's weights: mmdetection's .pth, or a folder or hub id of transformers."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP for colours: folder or hub id."""
    known_image: str | None = None
    """A photograph with a person, for the detector's self-test; matplotlib's sample when not given."""
    sprites: str = "shapes"
    """What scenes are made of, for detector=scenes."""
    captions: str | None = None
    """Training captions to look for the prompts in: any data source, or FILE.txt."""
    num_captions: int | None = None
    """Look at so many captions; else at all, of scenes at 100,000."""

    def __post_init__(self) -> None:
        if self.prompts_only:
            return
        super().__post_init__()
        if self.model is not None and self.detector == "scenes":
            raise ValueError(
                "detector=scenes knows sprites only and cannot see GenEval's objects: score a generator of scenes with "
                "python -m vqrae.eval.geneval.scenes, or give images="
            )
        if self.images_per_prompt < 1:
            raise ValueError(
                f"got images_per_prompt={self.images_per_prompt}, expected a positive number"
            )


def draw_suite(
    config: GenEvalConfig, records: list[dict[str, Any]], folder: Path, device: str
) -> None:
    """Draw the images of a suite that `folder` lacks."""
    suite = {"suite": suite_name(records), "images_per_prompt": config.images_per_prompt}
    claim_folder(folder, {**config.drawing_settings(), **suite}, "out")
    if is_main_process():
        write_prompts(folder, records)
    orders = image_orders(folder, records, config.images_per_prompt)
    draw_missing(
        config.load_generator(device),
        orders,
        sampling=config.sampling,
        batch_size=config.batch_size,
        progress=progress_line("images") if is_main_process() else None,
    )
    if is_main_process():
        write_grids(folder)


def score(
    config: GenEvalConfig, judges: Judges, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores and result rows of a folder of images.

    Raises:
        ValueError: when the folder holds no images, or prompts that the detector cannot judge.
    """
    records = read_prompts(folder)
    require_known_classes(judges, records)
    progress = progress_line("scores") if is_main_process() else None
    broken: dict[str, str] = {}
    rows = score_folder(
        folder,
        judges.detector,
        judges.classifier,
        known=judges.known,
        progress=progress,
        broken=broken,
        kept=None
        if config.detector == "scenes"
        else Path(config.out) / "rows",  # rules without weights are fast
        identity=judges.identity,
    )
    settings = folder / "settings.json"
    manifest = score_manifest(
        detector=judges.detector.name,
        weights=judges.identity,
        suite=suite_name(records),
        images=read_json(settings) if settings.is_file() else {"folder": str(folder)},
    )
    found = {
        "num_broken": len(broken),
        "broken": broken,
        "incomplete": uneven_prompts(folder, rows),
        "mistaken_colors": judges.mistaken,
    }
    return {"benchmark": judges.benchmark, **summarize(rows), **found, "manifest": manifest}, rows


def leakage(config: GenEvalConfig, records: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the prompts are among the training captions."""
    assert config.captions is not None
    captions = training_captions(config.captions, config.num_captions)
    return {
        "captions": config.captions,
        **leakage_report([record["prompt"] for record in records], captions),
    }


def main(argv: list[str] | None = None) -> None:
    config = parse(GenEvalConfig, argv)
    quiet_libraries()
    out, records = Path(config.out), official_prompts(config.seed)
    if config.prompts_only:
        if not is_main_process():
            return
        write_text(out / "evaluation_metadata.jsonl", metadata_lines(records))
        print(
            f"{len(records)} prompts, suite {suite_name(records)}  ->  {out / 'evaluation_metadata.jsonl'}"
        )
        if config.captions is not None:
            found = leakage(config, records)
            write_json(out / "leakage.json", found)
            print(leakage_line(found))
        return
    with processes(config.chosen_device()) as device:
        try:
            judges = build_judges(
                config.detector,
                weights=config.weights,
                clip=config.clip,
                sprites=config.sprites,
                known_image=config.known_image,
                device=device,
            )
        except NotMeasured as error:
            print(f"detector={config.detector}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if is_main_process():
            out.mkdir(parents=True, exist_ok=True)
            hold(out / ".lock", str(out))
        folder = Path(config.images) if config.images is not None else out / "images"
        if config.images is None:
            draw_suite(config, records, folder, device)
        values, rows = score(config, judges, folder)
    if is_main_process():
        if config.captions is not None:
            values["leakage"] = leakage(config, read_prompts(folder))
        write_rows(out / "results.jsonl", rows)
        write_json(out / "scores.json", values)
        print(text_table(values))
        print(f"{values['num_images']} images of {folder}  ->  {out / 'scores.json'}")


def text_table(values: dict[str, Any]) -> str:
    """The scores for people, with intervals, and what is wrong with the folder or the prompts."""
    lines = [
        f"{values['benchmark']}, detector {values['manifest']['detector']}, suite {values['manifest']['suite']}"
    ]
    for key in (*FAMILIES, "overall"):
        if key in values:
            low, high = values["intervals"][key]
            lines.append(f"{key:<16}{values[key]:>8.1%}   [{low:.1%}, {high:.1%}]")
    if values["num_broken"]:
        reason = next(iter(values["broken"].values()))
        lines.append(f"BROKEN: {values['num_broken']} images are not in the score; {reason}")
    if values["mistaken_colors"]:
        lines.append(
            f"WARNING: the colour classifier fails on plain balls: {values['mistaken_colors']}; check its weights"
        )
    if values["incomplete"]:
        lines.append(
            f"INCOMPLETE: {len(values['incomplete'])} prompts lack images, such as {values['incomplete'][0]}"
        )
    if "leakage" in values:
        lines.append(leakage_line(values["leakage"]))
    return "\n".join(lines)


def leakage_line(found: dict[str, Any]) -> str:
    """A leakage report in one line."""
    return (
        f"leakage: {found['normalized']} of {found['num_prompts']} prompts are among {found['num_captions']} captions "
        f"({found['exact']} of them exactly), {found['contained']} are part of longer ones"
    )


if __name__ == "__main__":
    run_main(main)
