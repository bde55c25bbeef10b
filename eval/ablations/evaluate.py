"""Sweep codebook dimension, codebook size, quantizer and training strategy: the paper's Tables 5 and 6 at any scale.

    python -m vqrae.eval.ablations.evaluate suite=table5 seeds=2
    python -m vqrae.eval.ablations.evaluate suite=my.yaml data=imagenet/train overrides=[stage2.max_steps=5000] nproc=8

A suite is a file of overrides (`configs/`), each run an ordinary `vqrae.tokenizer.train` in a run directory of its own,
`output/SUITE/RECIPE/ROW/seed-N`. The same command resumes: finished runs are read, not repeated. `output/SUITE.json` and
`.md` are written after every run.
"""

import dataclasses
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_utils import set_seed

from vqrae.common.checkpoints import local_model
from vqrae.common.cli import parse
from vqrae.common.config import load_config, shipped_config
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, weights_fingerprint, write_json, write_text
from vqrae.common.run import format_duration, quiet_libraries, run_manifest
from vqrae.data.sources import fingerprint, source_kind
from vqrae.eval.ablations.suites import Recipe, Row, Suite, load_suite, suite_names
from vqrae.eval.ablations.tables import judge, markdown
from vqrae.eval.features import evaluate as features
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.eval.reconstruction.protocols import Protocol
from vqrae.eval.sharding import run_module
from vqrae.tokenizer import train
from vqrae.tokenizer.build import build_tokenizer, check_quantizer
from vqrae.tokenizer.config import TokenizerTrainConfig


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Train and score every row of a suite, and write its table."""

    suite: str = "all"
    """table5, table6, quantizers, locality, all of them, or a YAML file of your own."""
    output: str = "runs/ablations"
    """Folder of the runs and of the tables."""
    encoder: str = "runs/encoder"
    """Pretrained encoder of all runs: run directory, checkpoint folder or hub id."""
    data: str = "scenes"
    """Source of images, see docs/data.md; its validation split is what reconstructions are scored on."""
    labelled_data: str | None = None
    """scenes, or a folder whose sub-folders are classes, for probes of features; None: data."""
    seeds: int = 1
    """Runs of each row, with seeds 0, 1, …; tables show mean ± half range, and claims need at least two."""
    overrides: tuple[str, ...] = ()
    """More `key.path=value` of the tokenizer's configuration for every run; they win over the suite's."""
    num_images: int = 500
    """Images that reconstructions are scored on."""
    frechet: Literal["encoder", "inception"] = "encoder"
    """Network of the Fréchet distance; encoder is the original one, which needs no other weights."""
    num_train: int = 1000
    """Images that probes learn from."""
    num_test: int = 500
    """Images that probes are asked about."""
    nproc: int = 1
    """Processes of each training, by torchrun; 1 trains in this one."""

    def __post_init__(self) -> None:
        if min(self.seeds, self.num_images, self.num_train, self.num_test, self.nproc) < 1:
            raise ValueError("seeds, num_images, num_train, num_test and nproc must be positive")

    @property
    def frechet_key(self) -> str:
        """Its name in the results."""
        return "rfid" if self.frechet == "inception" else f"frechet_{self.frechet}"


@dataclass(frozen=True)
class Run:
    """One training of a row.

    Attributes:
        arguments: of `vqrae.tokenizer.train`.
        config: what they resolve to.
    """

    recipe: Recipe
    row: Row
    seed: int
    folder: Path
    arguments: list[str]
    config: TokenizerTrainConfig

    @property
    def record_file(self) -> Path:
        """Settings of the training, and scores once it has them."""
        return self.folder / "ablation.json"

    def record(self) -> dict[str, Any]:
        """What is known of the run; empty before its first launch."""
        return read_json(self.record_file) if self.record_file.exists() else {}

    def settings(self) -> dict[str, Any]:
        """All that decides the result, but for the encoder's weights: a flat mapping, as JSON would give it back."""
        flat = dict(_flat(json.loads(json.dumps(dataclasses.asdict(self.config))), ""))
        return {
            key: value for key, value in flat.items() if key not in ("output_dir", "model.encoder")
        }


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Ablation:
    """The runs of one suite and their results.

    Args:
        name: of the results.

    Raises:
        ConfigError: for an override that the tokenizer's configuration does not accept.
        ValueError: for settings that a quantizer cannot follow, or data that the suite's columns cannot be measured on.
    """

    def __init__(self, name: str, suite: Suite, config: AblationConfig) -> None:
        self.name, self.suite, self.config = name, suite, config
        self.output = Path(config.output)
        self.labelled_data = config.labelled_data or config.data
        if suite.of_features and source_kind(self.labelled_data) not in ("scenes", "folder"):
            raise ValueError(
                f"suite {name} probes features, and {self.labelled_data} has no labels: give labelled_data="
            )
        if suite.of_codes and source_kind(config.data) != "scenes":
            raise ValueError(
                f"suite {name} asks what codes know of scenes, got data={config.data}: give data=scenes"
            )
        # All rows once before any of them again, so that an interrupted sweep has a whole table.
        self.runs = [
            self._run(recipe, row, seed)
            for seed in range(config.seeds)
            for recipe, row in suite.trials()
        ]
        self.records: dict[Path, dict[str, Any]] = {}

    def _run(self, recipe: Recipe, row: Row, seed: int) -> Run:
        folder = self.output / self.name / recipe.name / row.name / f"seed-{seed}"
        arguments = [
            *self.suite.overrides,
            *recipe.overrides,
            *row.overrides,
            f"model.encoder={self.config.encoder}",
            f"data.train={self.config.data}",
            f"seed={seed}",
            *self.config.overrides,
            f"output_dir={folder}",
        ]
        config = load_config(
            TokenizerTrainConfig, shipped_config("vqrae.tokenizer", self.suite.config), arguments
        )
        check_quantizer(config)
        return Run(recipe, row, seed, folder, [self.suite.config, *arguments], config)

    def execute(self) -> None:
        """Train and score what is not done yet, and keep the table up to date.

        Raises:
            ValueError: when a folder holds a run with other settings, before anything is trained.
        """
        self._prepare()
        for run in self.runs:
            self._check(run)
        finished = [run for run in self.runs if "metrics" in run.record()]
        waiting = [run for run in self.runs if run not in finished]
        for run in finished:
            self.records[run.folder] = self._finish(run)
        self._write()
        begun = time.monotonic()
        for done, run in enumerate(waiting):
            left = (
                f", {format_duration((time.monotonic() - begun) / done * (len(waiting) - done))} left"
                if done
                else ""
            )
            print(
                f"===== {self.name}, run {done + 1} of {len(waiting)}{left}: {run.folder} =====",
                flush=True,
            )
            self.records[run.folder] = self._finish(run)
            self._write()

    def _prepare(self) -> None:
        """Keep an untrained tokenizer with the original encoder: features and Fréchet distances are compared with it."""
        model = self.runs[0].config.model
        self.encoder = weights_fingerprint(local_model(str(model.encoder)))
        self.original = self.output / self.name / "original" / "model"
        set_seed(0)  # its weights are its identity
        build_tokenizer(model, "eager").save_pretrained(self.original)
        self.original_features: dict[str, Any] = {}
        if self.suite.of_features:
            scores = self._features(self.original)
            self.original_features = {
                name: scores[name] for name in ("linear_continuous", "linear_chance")
            }

    def _training(self, run: Run) -> dict[str, Any]:
        return {**run.settings(), "encoder_weights": self.encoder}

    def _check(self, run: Run) -> None:
        old, new = run.record().get("training", {}), self._training(run)
        # A setting that came after the run has the default that leaves it as it was.
        if changed := [key for key in old if old[key] != new.get(key)]:
            changes = ", ".join(f"{key}={old[key]} (now {new.get(key)})" for key in changed)
            raise ValueError(
                f"{run.folder} was trained with {changes}: give another output=, or delete it"
            )

    def _finish(self, run: Run) -> dict[str, Any]:
        """The record of a run: trained and scored now, or read."""
        record, training, model = run.record(), self._training(run), run.folder / "model"
        if not record:
            write_json(run.record_file, {"training": training})
        try:
            if not model.is_dir():
                self._train(run.arguments)
        except FloatingPointError as error:  # an outcome, and the other rows are as good as ever
            print(f"{run.folder} diverged: {error}", flush=True)
            return {"metrics": {"diverged": str(error)}}
        evaluation = {**self._evaluation(), "tokenizer": weights_fingerprint(model)}
        if record.get("evaluation") != evaluation:
            metrics = self._reconstruction(model)
            if self.suite.of_features:
                metrics |= self._features(model)
            if self.suite.of_codes:
                metrics |= self._locality(model)
            record = {"training": training, "evaluation": evaluation, "metrics": metrics}
            write_json(run.record_file, record)
        return record

    def _train(self, arguments: list[str]) -> None:
        run_module(train, arguments, self.config.nproc)

    # ---- scores

    def _evaluation(self) -> dict[str, Any]:
        """What the scores depend on besides the tokenizer."""
        config = self.config
        values = {
            "data": config.data,
            "num_images": config.num_images,
            "frechet": config.frechet,
            "encoder": self.encoder,
        }
        values["protocol"] = dataclasses.asdict(Protocol())  # its SSIM has changed once
        if self.suite.of_features:
            values |= {
                "labelled_data": self.labelled_data,
                "num_train": config.num_train,
                "num_test": config.num_test,
            }
        return values

    def _reconstruction(self, model: Path) -> dict[str, Any]:
        """Scores of images that were not trained on, with a grid of examples beside the run."""
        output = model.parent / "reconstruction.json"
        reconstruction.main([
            f"model={model}",
            f"output={output}",
            f"data={self.config.data}",
            "split=validation",
            f"num_images={self.config.num_images}",
            f"frechet=[{self.config.frechet}]",
            "lpips=[]",
            f"original_encoder={self.original}",
            f"reference={self.output / self.name / 'references'}",
        ])  # fmt: skip
        values = read_json(output)
        names = ("psnr", "ssim", "codebook_usage", "perplexity")
        return {name: values[name] for name in names} | {"frechet": values[self.config.frechet_key]}

    def _features(self, model: Path) -> dict[str, Any]:
        """Probes on labelled images: on each labelled cell of scenes, on whole images of folders."""
        output = model.parent / "features.json"
        features.main([
            f"model={model}",
            f"output={output}",
            f"data={self.labelled_data}",
            f"num_train={self.config.num_train}",
            f"num_test={self.config.num_test}",
            f"original_encoder={self.original}",
        ])  # fmt: skip
        [stage] = read_json(output)["stages"].values()
        task = next(iter(stage["tasks"].values()))
        linear = {f"linear_{kind}": task[kind]["linear"] for kind in features.KINDS}
        return {
            "teacher_cosine": stage["teacher_cosine"],
            **linear,
            "linear_chance": task["chance"],
        }

    def _locality(self, model: Path) -> dict[str, Any]:
        """What codes know of the thing around their patch, and how combinations come back."""
        output, sprites = (
            model.parent / "locality.json",
            self.config.data.partition(":")[2] or "shapes",
        )
        evaluator = importlib.import_module(self.suite.codes_evaluator)
        evaluator.main([f"model={model}", f"output={output}", f"sprites={sprites}"])
        values = read_json(output)
        return {"known_share": values["known_share"], **values["reconstruction"]}

    # ---- results

    def results(self) -> dict[str, Any]:
        """Everything that is known so far, as it is written to JSON."""
        rows = []
        for recipe, row in self.suite.trials():
            runs = [
                run
                for run in self.runs
                if (run.recipe, run.row) == (recipe, row) and run.folder in self.records
            ]
            shown = [
                {"seed": run.seed, "metrics": self.records[run.folder]["metrics"]} for run in runs
            ]
            rows.append(
                {
                    "recipe": recipe.name,
                    "row": row.name,
                    "labels": row.labels,
                    "paper": row.paper,
                    "runs": shown,
                }
            )
        claims = [
            {
                **dataclasses.asdict(claim),
                "verdicts": {r.name: judge(claim, rows, r.name) for r in self.suite.recipes},
            }
            for claim in self.suite.claims
        ]
        return {
            "title": self.suite.title,
            "rows": rows,
            "claims": claims,
            "frechet": self.config.frechet_key,
            "original_features": self.original_features,
            "notes": self._notes(),
            "settings": dataclasses.asdict(self.config),
            "manifest": run_manifest(
                fingerprints={"data": fingerprint(self.config.data), "encoder": self.encoder}
            ),
        }

    def _notes(self) -> list[str]:
        """What a reader of the table must know."""
        config = self.config
        notes = [
            f"{config.seeds} seed{'s' if config.seeds > 1 else ''}, mean ± half range, of {config.num_images} images of "
            f"`{config.data}` that were not trained on; encoder `{self.encoder[:16]}`.",
            f"`{config.frechet_key}` stands where the paper has rFID.",
        ]
        if config.frechet == "encoder":
            notes[-1] += (
                " It is taken in the encoder that training started from, which is no independent judge."
            )
        if self.suite.of_features:
            notes.append(
                "A linear probe on the continuous features stands where the paper has understanding benchmarks; always giving "
                f"the most frequent class scores {self.original_features['linear_chance']:.1%}."
            )
        return notes

    def _write(self) -> None:
        values = self.results()
        write_json(self.output / f"{self.name}.json", values)
        write_text(self.output / f"{self.name}.md", markdown(values, self.suite))


def main(argv: list[str] | None = None) -> None:
    config = parse(AblationConfig, argv)
    quiet_libraries()
    ablations = [
        Ablation(name, load_suite(source), config)
        for name, source in suite_names(config.suite).items()
    ]
    for ablation in ablations:
        ablation.execute()
    for ablation in ablations:
        print((ablation.output / f"{ablation.name}.md").read_text())


if __name__ == "__main__":
    run_main(main)
