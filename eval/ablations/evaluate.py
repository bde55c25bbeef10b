"""Sweep codebooks, quantizers and training strategy: VQRAE's Tables 5 and 6, UniTok's 7 and 8.

    python -m vqrae.eval.ablations.evaluate suite=size seeds=3
    python -m vqrae.eval.ablations.evaluate suite=my.yaml data=imagenet/train nproc=8 \
        overrides=[stage2.max_steps=5000]

A suite is a file of overrides (`configs/`), each run an ordinary `vqrae.tokenizer.train` in its own
run directory, `output/SUITE/RECIPE/ROW/seed-N`. The same command resumes: finished runs are read,
not repeated. `output/SUITE.json` and `.md` are written after every run.
"""

import dataclasses
import importlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from transformers.trainer_utils import set_seed

from vqrae.common import run
from vqrae.common.checkpoints import local_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range, load_config, shipped_config
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, weights_fingerprint, write_json, write_text
from vqrae.common.run import format_duration, quiet_libraries, run_manifest
from vqrae.data.sources import fingerprint, source_kind
from vqrae.eval.ablations.suites import SUITES, Suite, load_suite
from vqrae.eval.ablations.tables import Result, ablation_table, measurements
from vqrae.eval.features import evaluate as features
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.eval.sharding import run_module
from vqrae.eval.verdicts import effect
from vqrae.eval.zeroshot import evaluate as zeroshot
from vqrae.tokenizer import train
from vqrae.tokenizer.build import build_tokenizer, check_quantizer
from vqrae.tokenizer.config import TokenizerTrainConfig

RECORD = "ablation.json"  # scores of a run


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Train and score every row of a suite, and write its table."""

    suite: str = "all"
    """A shipped one (`vqrae.eval.ablations.suites.SUITES`), all of them, or a YAML file."""
    output: str = "runs/ablations"
    """Folder of the runs and of the tables."""
    encoder: str = "runs/encoder"
    """Pretrained encoder of all runs: run directory, checkpoint folder or hub id. Suites whose
    configuration has none train their own."""
    data: str = "scenes"
    """Source of images, see docs/data.md; reconstructions are scored on its validation split."""
    labelled_data: str | None = None
    """scenes, or a folder whose sub-folders are classes, for probes of features; None: data."""
    seeds: int = 1
    """Runs of each row, with seeds 0, 1, …; claims need at least two."""
    overrides: tuple[str, ...] = ()
    """More `key.path=value` of the tokenizer's configuration for every run; they win over the
    suite's."""
    num_images: int = 500
    """Images that reconstructions are scored on."""
    frechet: Literal["encoder", "inception"] = "encoder"
    """Network of the Fréchet distance; encoder is the original one, it needs no other weights."""
    num_train: int = 1000
    """Images that probes learn from."""
    num_test: int = 500
    """Images that probes are asked about."""
    nproc: int = 1
    """Processes of each training, by torchrun; 1 trains in this one."""
    minutes: float = math.inf
    """No run begins after this time."""

    def __post_init__(self) -> None:
        check_range(self, "seeds", "num_images", "num_train", "num_test", "nproc", low=1)

    @property
    def frechet_key(self) -> str:
        """The name of the distance in the results."""
        return "rfid" if self.frechet == "inception" else f"frechet_{self.frechet}"


@dataclass(frozen=True)
class Trial:
    """One training of a row."""

    result: Result
    """Where its metrics go."""
    seed: int
    folder: Path
    base: str
    """Name or YAML file of the tokenizer's configuration."""
    overrides: dict[str, str]
    """Of it, by key."""
    config: TokenizerTrainConfig


def plan_trials(
    name: str, suite: Suite, config: AblationConfig
) -> tuple[list[Result], list[Trial]]:
    """The empty results of a suite, and its trainings: every row once before any of them again.

    Args:
        name: of the results.

    Raises:
        ConfigError: for an override that the tokenizer's configuration does not accept.
        ValueError: for settings that a quantizer cannot follow, or data that a column of the suite
            cannot be measured on.
    """
    labelled = config.labelled_data or config.data
    if suite.needs("features") and source_kind(labelled) not in ("scenes", "folder"):
        raise ValueError(
            f"suite {name} probes features, and {labelled} has no labels: give labelled_data="
        )
    if suite.needs("codes") and source_kind(config.data) != "scenes":
        raise ValueError(
            f"suite {name} asks what codes know of scenes, got data={config.data}: give data=scenes"
        )
    results: list[Result] = []
    for recipe, row in suite.trials():
        labels = {"labels": row.labels, "paper": row.paper}
        results.append({"recipe": recipe.name, "row": row.name, **labels, "runs": []})
    trials = []
    for seed in range(config.seeds):
        for result, (recipe, row) in zip(results, suite.trials(), strict=True):
            arguments = [*suite.overrides, *recipe.overrides, *row.overrides]
            base = row.config or suite.config
            if has_encoder(base):
                arguments.append(f"model.encoder={config.encoder}")
            arguments += [f"data.train={config.data}", f"seed={seed}", *config.overrides]
            folder = Path(config.output) / name / recipe.name / row.name / f"seed-{seed}"
            resolved = parse_tokenizer(base, [*arguments, f"output_dir={folder}"])
            check_quantizer(resolved)
            overrides = dict(argument.split("=", 1) for argument in arguments)
            trials.append(Trial(result, seed, folder, base, overrides, resolved))
    return results, trials


def parse_tokenizer(base: str, overrides: list[str]) -> TokenizerTrainConfig:
    """The configuration of a shipped name or of a YAML file."""
    return load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", base), overrides)


def has_encoder(base: str) -> bool:
    """Whether trainings of a configuration start from a pretrained encoder."""
    return parse_tokenizer(base, []).model.encoder is not None


def sweep(name: str, suite: Suite, config: AblationConfig) -> None:
    """Train and score what is not done yet, and write the table after every run.

    Raises:
        ValueError: when a finished run has other settings, before anything is trained.
    """
    begin = time.monotonic()
    results, trials = plan_trials(name, suite, config)
    # An untrained tokenizer has the encoder that features and distances are compared with.
    original = Path(config.output) / name / "original" / "model"
    set_seed(0)  # its weights are its identity
    build_tokenizer(trials[0].config.model, "eager").save_pretrained(original)
    pretrained = has_encoder(suite.config)
    is_probed = suite.needs("features") and pretrained
    probes = score_features(original, original, config) if is_probed else {}
    encoder = weights_fingerprint(local_model(config.encoder)) if pretrained else "from scratch"

    def finish(trial: Trial) -> dict[str, Any]:
        settings: dict[str, Any] = dict(trial.overrides)
        settings.pop("model.encoder", None)  # it may move; its weights decide
        if trial.base != suite.config:
            settings["config"] = trial.base
        settings |= {"encoder": encoder, "num_images": config.num_images, "frechet": config.frechet}
        if suite.needs("features"):
            keys = ("labelled_data", "num_train", "num_test")
            settings |= {key: getattr(config, key) for key in keys}
        return run.kept(
            trial.folder / RECORD, settings, lambda: train_and_score(trial, original, suite, config)
        )

    def write() -> None:
        values = summarize(suite, config, results, probes, encoder)
        write_json(Path(config.output) / f"{name}.json", values)
        write_text(Path(config.output) / f"{name}.md", ablation_table(values, suite))

    # Finished runs come first: where one has other settings, nothing is trained.
    waiting = [trial for trial in trials if not (trial.folder / RECORD).exists()]
    finished = [trial for trial in trials if trial not in waiting]
    for number, trial in enumerate([*finished, *waiting], start=-len(finished)):
        if number >= 0:
            seconds = (time.monotonic() - begin) * (len(waiting) - number) / max(number, 1)
            left = f", {format_duration(seconds)} left" if number else ""
            if time.monotonic() - begin > 60 * config.minutes:
                print(f"{len(waiting) - number} runs of {name} are left to a later launch")
                write()  # there may be no run at all
                break
            place = f"run {number + 1} of {len(waiting)}{left}: {trial.folder}"
            print(f"===== {name}, {place} =====", flush=True)
        try:
            metrics = finish(trial)["metrics"]
        except FloatingPointError as error:  # an outcome; the other rows are not affected
            print(f"{trial.folder} diverged: {error}", flush=True)
            metrics = {"diverged": str(error)}
        trial.result["runs"].append({"seed": trial.seed, "metrics": metrics})
        write()


def train_and_score(
    trial: Trial, original: Path, suite: Suite, config: AblationConfig
) -> dict[str, Any]:
    """Train a row if it is not trained, and measure the suite's columns."""
    model = trial.folder / "model"
    if not model.is_dir():
        overrides = [f"{key}={value}" for key, value in trial.overrides.items()]
        arguments = [trial.base, *overrides, f"output_dir={trial.folder}"]
        run_module(train, arguments, config.nproc)
    # A distance of features says nothing where the original encoder is random.
    frechet = (config.frechet,) if has_encoder(suite.config) else ()
    metrics = score_reconstruction(model, original, config, frechet)
    if suite.needs("features"):
        metrics |= score_features(model, original, config)
    if suite.needs("zeroshot") and trial.config.model.text_config is not None:
        metrics |= score_zeroshot(model, config)
    if suite.needs("codes"):
        sprites = f"sprites={config.data.partition(':')[2] or 'shapes'}"
        evaluator = importlib.import_module(suite.codes_evaluator)
        values = run_evaluation(evaluator, model, "locality", sprites)
        metrics |= {key: values[key] for key in ("known_share", "code_given_patch")}
        metrics |= values["reconstruction"]
    return {"metrics": metrics}


def run_evaluation(module: ModuleType, model: Path, name: str, *arguments: str) -> dict[str, Any]:
    """What an evaluation command writes next to a model."""
    output = model.parent / f"{name}.json"
    module.main([f"model={model}", f"output={output}", *arguments])
    return read_json(output)


def score_reconstruction(
    model: Path, original: Path, config: AblationConfig, frechet: tuple[str, ...]
) -> dict[str, Any]:
    """Scores of images that were not trained on; a grid of examples is written next to the run."""
    values = run_evaluation(
        reconstruction,
        model,
        "reconstruction",
        f"data={config.data}",
        "split=validation",
        f"num_images={config.num_images}",
        f"frechet=[{', '.join(frechet)}]",
        "lpips=[]",
        f"original_encoder={original}",
        f"reference={original.parents[1] / 'references'}",
    )
    names = ("psnr", "ssim", "codebook_usage", "codebook_usage_min", "perplexity")
    metrics = {name: values[name] for name in names if name in values}
    return metrics | ({"frechet": values[config.frechet_key]} if frechet else {})


def score_features(model: Path, original: Path, config: AblationConfig) -> dict[str, Any]:
    """Probes on labelled images: on each labelled cell of scenes, on whole images of folders."""
    values = run_evaluation(
        features,
        model,
        "features",
        f"data={config.labelled_data or config.data}",
        f"num_train={config.num_train}",
        f"num_test={config.num_test}",
        f"original_encoder={original}",
    )
    [stage] = values["stages"].values()
    task = next(iter(stage["tasks"].values()))
    return {
        "teacher_cosine": stage["teacher_cosine"],
        "linear_continuous": task["continuous"]["linear"],
        "linear_quantized": task["quantized"]["linear"],
        "linear_chance": task["chance"],
    }


def score_zeroshot(model: Path, config: AblationConfig) -> dict[str, Any]:
    """Naming of objects and retrieval of captions by the quantized features."""
    count = f"num_images={config.num_images}"
    values = run_evaluation(zeroshot, model, "zeroshot", f"data={config.data}", count)
    [stage] = values["stages"].values()
    found = stage["quantized"]
    return {
        "object_quantized": found["object"]["top1"],
        "caption_quantized": found["image_to_text"]["r1"],
    }


def summarize(
    suite: Suite,
    config: AblationConfig,
    results: list[Result],
    probes: dict[str, float],
    encoder: str,
) -> dict[str, Any]:
    """Everything that is known so far, as it is written to JSON.

    Args:
        probes: of the original encoder.
        encoder: its fingerprint.
    """
    claims = []
    numbers = {recipe.name: measurements(results, recipe.name) for recipe in suite.recipes}
    for claim in suite.claims:
        effects = {name: effect(claim, rows) for name, rows in numbers.items()}
        claims.append({**dataclasses.asdict(claim), "effects": effects})
    notes = [
        f"{config.seeds} seed{'s' if config.seeds > 1 else ''}, mean ± half range, of "
        f"{config.num_images} images of `{config.data}` that were not trained on; encoder "
        f"`{encoder[:16]}`.",
    ]
    if has_encoder(suite.config):
        notes.append(f"`{config.frechet_key}` replaces the paper's rFID.")
    if has_encoder(suite.config) and config.frechet == "encoder":
        notes[-1] += " It uses the encoder that training started from: not an independent judge."
    shown = {name: probes[name] for name in ("linear_continuous", "linear_chance") if probes}
    if shown:
        notes.append(
            "A linear probe on the continuous features replaces the paper's understanding "
            f"benchmarks; the most frequent class alone scores {shown['linear_chance']:.1%}."
        )
    prints = {"data": fingerprint(config.data), "encoder": encoder}
    return {
        "title": suite.title,
        "rows": results,
        "claims": claims,
        "frechet": config.frechet_key,
        "original_features": shown,
        "notes": notes,
        "settings": dataclasses.asdict(config),
        "manifest": run_manifest(fingerprints=prints),
    }


def main(argv: list[str] | None = None) -> None:
    config = parse(AblationConfig, argv)
    quiet_libraries()
    suites: dict[str, Suite] = {}
    for source in SUITES if config.suite == "all" else (config.suite,):
        suites[Path(source).stem] = load_suite(source)
    for name, suite in suites.items():  # mistakes in any of them are found before the first starts
        plan_trials(name, suite, config)
    for name, suite in suites.items():
        sweep(name, suite, config)
    for name in suites:
        print((Path(config.output) / f"{name}.md").read_text())


if __name__ == "__main__":
    run_main(main)
