"""What the steps of a quickstart run left in its folder, read for the report.

    DIR/plan.json, DIR/steps/NAME.json        budget in minutes and optimizer steps; seconds of every step
    DIR/{encoder,tokenizer,llm,…}             run directories
    DIR/evaluation/                           reconstruction.json, questions.json, generation.json, images/

A step that has not run leaves None or nothing.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqrae.common.checkpoints import resolve_model
from vqrae.common.files import json_lines, read_json
from vqrae.common.images import open_image
from vqrae.common.run import read_metrics
from vqrae.data.code_shards import read_manifest
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import FAMILIES
from vqrae.eval.geneval.folders import list_samples
from vqrae.eval.geneval.scenes import holds_held_out
from vqrae.quickstart.scene_questions import is_correct
from vqrae.tokenizer.modeling import VQRAEModel

STEPS = (
    "encoder",
    "tokenizer",
    "eval_reconstruction",
    "llm",
    "understanding",
    "eval_understanding",
    "codes",
    "generation",
    "eval_generation",
)


BUDGETS = (12, 90)
"""Minutes of the default run and of the long one, which the expectations are for."""


@dataclass(frozen=True)
class Curve:
    """One metric of one training run."""

    title: str
    folder: str
    """Run directory below the run's folder."""
    key: str
    caption: str


CURVES = (
    Curve("Encoder", "encoder", "loss", "contrastive loss of images and captions"),
    Curve(
        "Tokenizer, stage 1",
        "tokenizer/stage1",
        "reconstruction_loss",
        "reconstruction loss, encoder frozen",
    ),
    Curve(
        "Tokenizer, stage 2",
        "tokenizer/stage2",
        "reconstruction_loss",
        "reconstruction loss, encoder trained",
    ),
    Curve("Codebook", "tokenizer/stage2", "codebook_usage", "share of the codes in use, stage 2"),
    Curve("Language model", "llm", "loss", "next word, text alone, nats"),
    Curve(
        "Understanding, pretrain",
        "understanding/pretrain",
        "loss",
        "next word, projector trained, nats",
    ),
    Curve(
        "Understanding, sft",
        "understanding/sft",
        "loss",
        "answers, language model trained too, nats",
    ),
    Curve("Generator", "generation", "loss", "next code, nats"),
)


@dataclass(frozen=True)
class Reconstructions:
    """Validation scenes 0, 1, …: images (M, 3, H, W) in [0, 1], their codes (M, N), what the codes decode to."""

    originals: Tensor
    codes: Tensor
    copies: Tensor
    codebook_size: int

    @property
    def psnr(self) -> list[float]:
        """Decibels of each image."""
        error = (self.originals - self.copies).square().flatten(1).mean(dim=1).clamp(min=1e-10)
        return (-10 * error.log10()).tolist()


@dataclass(frozen=True)
class Answer:
    """An answer to a question about a scene, beside the right one."""

    question: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        return is_correct(self.answer, self.expected)


@dataclass(frozen=True)
class AskedScene:
    """Validation scene `index` (3, H, W) in [0, 1] with what was asked about it."""

    index: int
    image: Tensor
    answers: list[Answer]


@dataclass(frozen=True)
class Sample:
    """One generated image; `correct` is None where it has not been scored."""

    image: Image.Image
    correct: bool | None
    reason: str


@dataclass(frozen=True)
class Prompt:
    """A prompt of the benchmark with its images; `held_out` when it names a combination that training never shows."""

    text: str
    held_out: bool
    samples: list[Sample]


class Evidence:
    """Reads a quickstart folder piece by piece, each once.

    Raises:
        ValueError: when the folder is missing or holds no quickstart run.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(
                f"{self.directory} does not exist: set directory= to the folder of a quickstart run"
            )
        if not (self.plan or self.seconds):
            raise ValueError(
                f"{self.directory} holds neither plan.json nor steps/: set directory= to a quickstart run"
            )

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.directory / name
        return read_json(path) if path.exists() else None

    # ---- figures

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        """Budget: minutes, sprites, optimizer steps."""
        return self._json("plan.json") or {}

    @property
    def budget(self) -> int | None:
        """Which of the `BUDGETS` this run had; None when it had less than the default."""
        minutes = self.plan.get("minutes", 0)
        return max((i for i, budget in enumerate(BUDGETS) if minutes >= budget), default=None)

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """Wall time of every finished step."""
        found = {name: self._json(f"steps/{name}.json") for name in STEPS}
        return {name: step["seconds"] for name, step in found.items() if step and step["done"]}

    @functools.cached_property
    def reconstruction(self) -> dict[str, Any] | None:
        return self._json("evaluation/reconstruction.json")

    @functools.cached_property
    def questions(self) -> dict[str, Any] | None:
        return self._json("evaluation/questions.json")

    @functools.cached_property
    def generation(self) -> dict[str, Any] | None:
        return self._json("evaluation/generation.json")

    @functools.cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """Manifest of every training run, by the name of its folder."""
        folders = dict.fromkeys(["encoder", "tokenizer", *(curve.folder for curve in CURVES)])
        found = {folder: self._json(f"{folder}/manifest.json") for folder in folders}
        return {folder: manifest for folder, manifest in found.items() if manifest}

    def curve(self, curve: Curve) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; empty when the run has not logged it."""
        rows = [row for row in read_metrics(self.directory / curve.folder) if curve.key in row]
        return [row["step"] for row in rows], [row[curve.key] for row in rows]

    @functools.cached_property
    def code_counts(self) -> np.ndarray | None:
        """How often each code occurs in the extracted code set (K,)."""
        folder = self.directory / "codes"
        if "codes" not in self.seconds:
            return None
        counts = np.zeros(read_manifest(folder).codebook_size, dtype=np.int64)
        for shard in sorted(folder.glob("shard-*.npy")):
            counts += np.bincount(np.load(shard, mmap_mode="r").ravel(), minlength=len(counts))
        return counts

    # ---- examples: always the first ones

    @functools.cached_property
    def scenes(self) -> SceneDataset:
        """Validation scenes of the kind that the run was trained on."""
        return SceneDataset("validation", sprites=self.plan.get("sprites", "shapes"))

    @torch.inference_mode()
    def reconstructions(self, count: int) -> Reconstructions | None:
        """The first `count` validation scenes through the tokenizer."""
        if not (self.directory / "tokenizer" / "model" / "config.json").exists():
            return None
        model = VQRAEModel.from_pretrained(resolve_model(self.directory / "tokenizer")).eval()
        originals = torch.stack([self.scenes.image(i) for i in range(count)]).float() / 255
        codes = model.encode(originals)
        return Reconstructions(originals, codes, model.decode(codes), model.config.codebook_size)

    def asked(self) -> list[AskedScene]:
        """The questions that the evaluation kept as examples, its first ones, by scene."""
        by_scene: dict[int, list[Answer]] = {}
        for example in (self.questions or {}).get("examples", []):
            answer = Answer(example["question"], example["expected"], example["answer"])
            by_scene.setdefault(example["index"], []).append(answer)
        return [
            AskedScene(index, self.scenes.image(index).float() / 255, answers)
            for index, answers in by_scene.items()
        ]

    def prompts(self, per_family: int) -> dict[str, list[Prompt]]:
        """The first prompts of each family with their images."""
        folder = self.directory / "evaluation" / "images"
        verdicts = self._verdicts()
        found: dict[str, dict[str, Prompt]] = {family: {} for family in FAMILIES}
        for path, metadata in list_samples(folder):
            family, key = found.setdefault(metadata["tag"], {}), path.parts[-3]
            if key not in family and len(family) == per_family:
                continue
            held_out = holds_held_out(metadata, self.scenes.sprites.names)
            prompt = family.setdefault(key, Prompt(metadata["prompt"], held_out, []))
            row = verdicts.get(path.parts[-3:], {})
            prompt.samples.append(
                Sample(open_image(path), row.get("correct"), row.get("reason", ""))
            )
        return {family: list(prompts.values()) for family, prompts in found.items() if prompts}

    def _verdicts(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Result rows by the last three parts of the image's path: the folder may have moved since."""
        path = self.directory / "evaluation" / "generation.jsonl"
        rows = [row for _, row in json_lines(path)] if path.exists() else []
        return {Path(row["filename"]).parts[-3:]: row for row in rows}


# ---- figures, and what is expected of them


@dataclass(frozen=True)
class Row:
    """One line of the table of figures, as text; `met` is None where nothing was promised or the budget was smaller."""

    label: str
    value: str
    expected: tuple[str, ...]
    met: bool | None
    note: str


def report_values(evidence: Evidence) -> dict[str, Any]:
    """The content of `report.json`; keys of steps that have not run are absent."""
    values: dict[str, Any] = {}
    retrieval = [
        row["retrieval_accuracy"]
        for row in read_metrics(evidence.directory / "encoder")
        if "retrieval_accuracy" in row
    ]
    if retrieval:
        values["encoder"] = {"retrieval_accuracy": retrieval[-1]}
    if evidence.reconstruction:
        values["tokenizer"] = evidence.reconstruction
    if evidence.questions:
        values["understanding"] = {
            key: value for key, value in evidence.questions.items() if key != "examples"
        }
    if evidence.generation:
        values["generation"] = evidence.generation
    return {
        **values,
        "seconds": evidence.seconds,
        "plan": evidence.plan,
        "manifests": evidence.manifests,
    }


def figure_rows(values: dict[str, Any], budget: int | None) -> list[Row]:
    """The table of figures, from the content of `report.json`, judged by the expectations of `budget`."""
    tokenizer, understanding, generation = (
        values.get(key, {}) for key in ("tokenizer", "understanding", "generation")
    )
    ceiling = generation.get("ceiling", {})
    accuracy, blind = understanding.get("accuracy"), understanding.get("blind_accuracy")
    gain = None if accuracy is None or blind is None else 100 * (accuracy - blind)
    codes = (
        f"share of the {tokenizer['codebook_size']} codes"
        if "codebook_size" in tokenizer
        else "share of the codebook"
    )

    def row(
        label: str, value: float | None, form: str, expected: tuple[float, ...] = (), note: str = ""
    ) -> Row:
        met = None if budget is None or value is None or not expected else value >= expected[budget]
        bounds = tuple(f"≥ {form.format(bound).replace('.0', '')}" for bound in expected) or (
            "",
        ) * len(BUDGETS)
        return Row(label, "—" if value is None else form.format(value), bounds, met, note)

    return [
        row(
            "Reconstruction, PSNR",
            tokenizer.get("psnr"),
            "{:.1f} dB",
            (24, 29),
            "distance of scenes and reconstructions",
        ),
        row(
            "Reconstruction, SSIM",
            tokenizer.get("ssim"),
            "{:.3f}",
            note="likeness of structure, 1 is identical",
        ),
        row(
            "Codebook usage",
            tokenizer.get("codebook_usage"),
            "{:.0%}",
            (0.9, 0.95),
            f"{codes} chosen at least once",
        ),
        row("Questions answered", accuracy, "{:.1%}", (0.75, 0.95), "about validation scenes"),
        row("… more than blind", gain, "{:+.1f} points", (25, 25), "what seeing adds to guessing"),
        row(
            "Prompts followed",
            generation.get("overall"),
            "{:.1%}",
            (0.4, 0.8),
            "mean of six families of prompts",
        ),
        row(
            "… ceiling of the codes",
            ceiling.get("reconstruction", {}).get("overall"),
            "{:.1%}",
            note="true scenes, tokenized",
        ),
        row(
            "… ceiling of the detector",
            ceiling.get("truth", {}).get("overall"),
            "{:.1%}",
            note="true scenes as they are",
        ),
    ]
