"""GenEval (Ghosh et al., arXiv 2310.11513): images of its prompts, generated or given.

    python -m vqrae.eval.geneval.evaluate model=runs/generation output=scenes.json
    python -m vqrae.eval.geneval.evaluate suite=official model=runs/generation output=official.json
    python -m vqrae.eval.geneval.evaluate suite=official images=FOLDER output=official.json
    python -m vqrae.eval.geneval.evaluate suite=official prompts_only=true output=official.json

`suite=scenes` asks for embedded scenes and scores by exact rules, with two ceilings: scenes that
satisfy the prompts, and their reconstructions by the tokenizer. `suite=official` has GenEval's own
prompts and detector. An interrupted run keeps the images and rows that it has.

    OUTPUT.json, OUTPUT.jsonl   scores with their manifest; GenEval's results file
    images/, rows/              next to them: what was generated, and each image's row
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vqrae.common.cli import parse
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, write_json, write_text
from vqrae.common.run import hold_folder, quiet_libraries, run_manifest
from vqrae.data.scenes.language import FAMILIES, benchmark_prompts
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.generated import ImagesConfig, claim_folder
from vqrae.eval.geneval.clip_colors import CLIP
from vqrae.eval.geneval.folders import (
    image_requests,
    read_prompts,
    score_folder,
    uneven_prompts,
    write_grids,
    write_prompts,
)
from vqrae.eval.geneval.judges import Judges, coco_judges, require_known_classes, scene_judges
from vqrae.eval.geneval.prompts import OFFICIAL_SEED, metadata_lines, official_prompts, suite_name
from vqrae.eval.geneval.rules import Record, summarize
from vqrae.eval.geneval.scenes import ceilings, scene_scores
from vqrae.eval.reconstruction.networks import NotMeasured
from vqrae.eval.sharding import processes


@dataclass(frozen=True, kw_only=True)
class GenEvalConfig(ImagesConfig):
    """Score images by GenEval's rules: of prompts about embedded scenes, or of its own prompts."""

    suite: Literal["scenes", "official"] = "scenes"
    """scenes: prompts about embedded scenes, exact detector; official: GenEval's own."""
    output: str
    """JSON file of the scores; GenEval's results file goes next to it as .jsonl, and images/."""
    images_per_prompt: int = 4
    """Images of each prompt; the official number is 4."""
    seed: int = OFFICIAL_SEED
    """Of the prompts: 43 gives the official 553, any other number a fresh suite."""
    sprites: str = "shapes"
    """What scenes are made of: shapes or emoji."""
    per_family: int = 25
    """Prompts of each of the six families about scenes."""
    detector: Literal["mmdet", "transformers"] = "mmdet"
    """Of the official suite: GenEval's own checkpoint, or another one of transformers."""
    weights: str | None = None
    """The detector's weights: mmdetection's .pth, or a folder or hub id of transformers."""
    clip: str = CLIP
    """CLIP for colours: folder or hub id."""
    prompts_only: bool = False
    """Write evaluation_metadata.jsonl and stop."""

    def __post_init__(self) -> None:
        load_sprites(self.sprites)
        if not self.prompts_only:
            super().__post_init__()
        if min(self.images_per_prompt, self.per_family) < 1:
            raise ValueError("images_per_prompt and per_family must be positive")
        if Path(self.output).suffix != ".json":
            raise ValueError(f"got output={self.output}, expected a .json file")


def suite_records(config: GenEvalConfig) -> list[Record]:
    """The prompts to generate images of."""
    if config.suite == "official":
        return official_prompts(config.seed)
    return benchmark_prompts(load_sprites(config.sprites).names, config.per_family, config.seed)


def suite_title(config: GenEvalConfig, records: list[Record]) -> str:
    """What scores call the suite: `official`, the choice of scenes, or a checksum."""
    if config.suite == "scenes" and config.model is not None:
        return f"scenes({config.sprites}, {config.per_family} per family, seed {config.seed})"
    return suite_name(records)


def suite_judges(config: GenEvalConfig, device: str) -> Judges:
    """Detector and colour classifier of the suite; exits with code 2 when weights are missing."""
    if config.suite == "scenes":
        return scene_judges(config.sprites)
    try:
        return coco_judges(config.detector, config.weights, config.clip, device)
    except NotMeasured as error:
        print(f"detector={config.detector}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def score(config: GenEvalConfig, judges: Judges, folder: Path) -> dict[str, Any]:
    """Score a folder of images; the rows go to the results file."""
    output, records = Path(config.output), read_prompts(folder)
    require_known_classes(judges, records)
    kept = output.with_name("rows") if config.suite == "official" else None  # exact rules are fast
    rows, broken = score_folder(folder, judges, kept)
    if is_main_process():
        write_text(output.with_suffix(".jsonl"), metadata_lines(rows))
    if config.suite == "official":
        scores = summarize(rows)
    else:
        scores = scene_scores(rows, records, load_sprites(config.sprites).names)
    settings = folder / "settings.json"
    manifest = {
        **run_manifest(),
        "detector": judges.detector.name,
        "weights": judges.identity,
        "suite": suite_title(config, records),
        "images": read_json(settings) if settings.is_file() else {"folder": str(folder)},
    }
    problems: dict[str, Any] = {
        "num_broken": len(broken),
        "broken": broken,
        "incomplete": uneven_prompts(folder, rows),
    }
    if config.suite == "scenes":  # the quickstart's report copies the file: only what there is
        problems = {key: value for key, value in problems.items() if value}
    return {"benchmark": judges.benchmark, **scores, **problems, "manifest": manifest}


def main(argv: list[str] | None = None) -> None:
    config = parse(GenEvalConfig, argv)
    quiet_libraries()
    output, records = Path(config.output), suite_records(config)
    if config.prompts_only:
        if is_main_process():
            file = output.with_name("evaluation_metadata.jsonl")
            write_text(file, metadata_lines(records))
            print(f"{len(records)} prompts, suite {suite_name(records)}  ->  {file}")
        return
    with processes(config.device) as device:
        judges = suite_judges(config, device)
        hold_folder(output.parent)
        ceiling = None
        if config.model is None:
            folder = Path(str(config.images))
        else:
            # ---- images: what the folder lacks is generated
            folder = output.with_name("images")
            suite = {"suite": suite_name(records), "images_per_prompt": config.images_per_prompt}
            claim_folder(folder, {**config.generation_settings(), **suite}, "output")
            if is_main_process():
                write_prompts(folder, records)
            generator = config.load_generator(device)
            requests = image_requests(folder, records, config.images_per_prompt)
            config.generate(generator, requests)
            if is_main_process():
                write_grids(folder)
            if config.suite == "scenes":
                ceiling = ceilings(
                    records,
                    generator.tokenizer,
                    sprites=config.sprites,
                    images_per_prompt=config.images_per_prompt,
                )
        # ---- scores
        values = score(config, judges, folder)
    if is_main_process():
        if ceiling is not None:
            images = values["manifest"]["images"]
            values |= {key: images[key] for key in ("generator", "dtype", "sampling")}
            values |= {"ceiling": ceiling, "detector": judges.detector.name}
        write_json(output, values)
        print(text_table(values))
        print(f"{values['num_images']} images in {folder}  ->  {output}")


def text_table(values: dict[str, Any]) -> str:
    """The scores for people, with intervals and ceilings, and what is wrong with the images."""
    manifest, ceiling = values["manifest"], values.get("ceiling", {})
    lines = [
        f"{values['benchmark']}, detector {manifest['detector']}, suite {manifest['suite']}",
        f"{'':<16}{'score':>8}   {'95 % interval':<16}"
        + "".join(f"{name:>16}" for name in ceiling),
    ]
    for key in (*FAMILIES, "overall"):
        if key in values:
            low, high = values["intervals"][key]
            line = f"{key:<16}{values[key]:>8.1%}   {f'[{low:.1%}, {high:.1%}]':<16}"
            lines.append(line + "".join(f"{found[key]:>16.1%}" for found in ceiling.values()))
    if broken := values.get("broken"):
        reason = next(iter(broken.values()))
        lines.append(f"BROKEN: {len(broken)} images are not in the score; {reason}")
    if incomplete := values.get("incomplete"):
        lines.append(f"INCOMPLETE: {len(incomplete)} prompts lack images, such as {incomplete[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
