"""What the steps of a quickstart run left in its folder, read for the report.

    DIR/plan.json                       budget in minutes and optimizer steps
    DIR/steps/NAME.json                 seconds of each step
    DIR/{encoder,tokenizer,llm,…}       run directories
    DIR/evaluation/                     reconstruction, questions, generation .json; images/

A step that has not run leaves None or nothing. Examples are always the first ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqrae.common.files import json_lines, read_json
from vqrae.common.images import open_image
from vqrae.common.run import read_metrics
from vqrae.data.code_shards import read_manifest
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import FAMILIES
from vqrae.eval.geneval.folders import list_samples
from vqrae.eval.geneval.scenes import holds_held_out
from vqrae.quickstart.systems import SYSTEMS, Curve, System
from vqrae.tokenizer.modeling import VQRAEModel

STEPS = (
    "encoder",
    "tokenizer",
    "eval_reconstruction",
    "eval_zeroshot",
    "llm",
    "understanding",
    "eval_understanding",
    "codes",
    "generation",
    "eval_generation",
)
# Of a unified model alone.
UNIFIED_STEPS = ("mllm", "eval_mllm_questions", "eval_mllm_generation")
BUDGETS = (12, 90)  # minutes of the default run and of the long one, which expectations are for


@dataclass(frozen=True)
class Evidence:
    """The figures of a run."""

    directory: Path
    plan: dict[str, Any]
    """Budget: minutes, sprites, optimizer steps."""
    seconds: dict[str, float]
    """Wall time of every finished step."""
    reconstruction: dict[str, Any] | None
    questions: dict[str, Any] | None
    generation: dict[str, Any] | None
    zero_shot: dict[str, Any] | None
    unified: dict[str, dict[str, Any]]
    """Scores of the unified model: `questions` and `generation`."""
    manifests: dict[str, dict[str, Any]]
    """Manifest of every training run, by the name of its folder."""

    @property
    def system(self) -> System:
        """Which tokenizer this run is of; older plans do not say."""
        return SYSTEMS[self.plan.get("system", "vqrae")]

    @property
    def budget(self) -> int | None:
        """Index of the largest of the `BUDGETS` that this run reached; None below the default."""
        minutes = self.plan.get("minutes", 0)
        return max((i for i, budget in enumerate(BUDGETS) if minutes >= budget), default=None)

    @property
    def scenes(self) -> SceneDataset:
        """Validation scenes of the kind that the run was trained on."""
        return SceneDataset("validation", sprites=self.plan.get("sprites", "shapes"))

    def curve(self, curve: Curve) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; empty when the run has not logged it."""
        steps, values = [], []
        for row in read_metrics(self.directory / curve.folder):
            if curve.key in row:
                steps.append(row["step"])
                values.append(row[curve.key])
        return steps, values


def read_evidence(directory: str | Path) -> Evidence:
    """The figures that are in a quickstart folder.

    Raises:
        ValueError: when the folder is missing or holds no quickstart run.
    """
    directory = Path(directory)

    def read(name: str) -> dict[str, Any] | None:
        path = directory / name
        return read_json(path) if path.exists() else None

    seconds = {}
    for name in STEPS + UNIFIED_STEPS:
        if (step := read(f"steps/{name}.json")) and step["done"]:
            seconds[name] = step["seconds"]
    manifests = {}
    folders = ["encoder", "tokenizer"]
    for system in SYSTEMS.values():
        folders += [curve.folder for curve in system.curves]
    for folder in dict.fromkeys(folders):
        if manifest := read(f"{folder}/manifest.json"):
            manifests[folder] = manifest
    unified = {}
    for name in ("questions", "generation"):
        if found := read(f"evaluation/mllm/{name}.json"):
            unified[name] = found
    plan = read("plan.json") or {}
    if not (plan or seconds):
        raise ValueError(
            f"{directory} holds neither plan.json nor steps/: set directory= to a quickstart run"
        )
    return Evidence(
        directory=directory,
        plan=plan,
        seconds=seconds,
        reconstruction=read("evaluation/reconstruction.json"),
        questions=read("evaluation/questions.json"),
        generation=read("evaluation/generation.json"),
        zero_shot=read("evaluation/zeroshot.json"),
        unified=unified,
        manifests=manifests,
    )


def report_values(evidence: Evidence) -> dict[str, Any]:
    """The content of `report.json`; keys of steps that have not run are absent."""
    values: dict[str, Any] = {}
    for row in read_metrics(evidence.directory / "encoder"):
        if "retrieval_accuracy" in row:
            values["encoder"] = {"retrieval_accuracy": row["retrieval_accuracy"]}
    scores = {
        "tokenizer": evidence.reconstruction,
        "understanding": evidence.questions,
        "generation": evidence.generation,
        "zero_shot": evidence.zero_shot,
        "unified_understanding": evidence.unified.get("questions"),
        "unified_generation": evidence.unified.get("generation"),
    }
    for name, found in scores.items():
        if found:
            unneeded = ("examples", "settings")
            values[name] = {key: value for key, value in found.items() if key not in unneeded}
    return {
        **values,
        "seconds": evidence.seconds,
        "plan": evidence.plan,
        "manifests": evidence.manifests,
    }


def read_report(directory: str | None) -> dict[str, Any]:
    """The `report.json` of another run; empty where there is none."""
    path = Path(directory or "") / "report.json"
    return read_json(path) if directory and path.exists() else {}


# ---- the table of figures


@dataclass(frozen=True)
class FigureRow:
    """One line as text; `met` is None where nothing was promised or the budget was smaller."""

    label: str
    value: str
    expected: tuple[str, ...]
    met: bool | None
    note: str
    tile: str = ""
    """What it is in large letters at the top of the page, if it is there."""
    compared: str = ""
    """The value of another system's run."""


def figure_rows(
    values: dict[str, Any], budget: int | None, other: dict[str, Any] | None = None
) -> list[FigureRow]:
    """The table, from the content of `report.json`, judged by the expectations of `budget`.

    Args:
        other: the `report.json` of another system's run, if there is one.
    """
    rows = _figure_rows(values, budget)
    if not other:
        return rows
    compared = {row.label: row.value for row in _figure_rows(other, None)}
    return [replace(row, compared=compared.get(row.label, "—")) for row in rows]


def _figure_rows(values: dict[str, Any], budget: int | None) -> list[FigureRow]:
    figures = [*_tokenizer_figures(values), *_model_figures(values)]
    return [figure.row(budget) for figure in figures]


class Figure(NamedTuple):
    """A figure of `report.json`, with its targets at each of the `BUDGETS`."""

    label: str
    value: float | None
    form: str
    note: str
    expected: tuple[float, ...] = ()
    tile: str = ""

    def row(self, budget: int | None) -> FigureRow:
        """The figure as text; it is met, or not, at the budget that the run reached."""
        value, expected = self.value, self.expected
        met = None if budget is None or value is None or not expected else value >= expected[budget]
        bounds = tuple(f"≥ {self.form.format(bound).replace('.0', '')}" for bound in expected)
        text = "—" if value is None else self.form.format(value)
        bounds = bounds or ("",) * len(BUDGETS)
        return FigureRow(self.label, text, bounds, met, self.note, self.tile)


def _tokenizer_figures(values: dict[str, Any]) -> Iterator[Figure]:
    found = values.get("tokenizer", {})
    psnr, ssim, usage = found.get("psnr"), found.get("ssim"), found.get("codebook_usage")
    size, codebooks = found.get("codebook_size"), found.get("num_codebooks", 1)
    codes = f"share of the {size} codes" if size else "share of the codebook"
    if codebooks > 1:
        codes += f" of each of {codebooks} codebooks"
    note, tile = "distance of scenes and reconstructions", "PSNR of reconstructions"
    yield Figure("Reconstruction, PSNR", psnr, "{:.1f} dB", note, (24, 29), tile)
    yield Figure("Reconstruction, SSIM", ssim, "{:.3f}", "likeness of structure, 1 is identical")
    note, tile = f"{codes} chosen at least once", "of the codebook in use"
    yield Figure("Codebook usage", usage, "{:.0%}", note, (0.9, 0.95), tile)


def _model_figures(values: dict[str, Any]) -> Iterator[Figure]:
    understanding, generation = values.get("understanding", {}), values.get("generation", {})
    accuracy, blind = understanding.get("accuracy"), understanding.get("blind_accuracy")
    note, tile = "about validation scenes", "of questions answered right"
    yield Figure("Questions answered", accuracy, "{:.1%}", note, (0.75, 0.95), tile)
    gain = None if accuracy is None or blind is None else 100 * (accuracy - blind)
    yield Figure("… more than blind", gain, "{:+.1f} points", "what seeing adds", (25, 25))
    note, tile = "mean of six families of prompts", "of images show what was asked for"
    yield Figure("Prompts followed", generation.get("overall"), "{:.1%}", note, (0.4, 0.8), tile)
    ceiling = generation.get("ceiling", {})
    for name, label, note in (
        ("reconstruction", "… ceiling of the codes", "true scenes, tokenized"),
        ("truth", "… ceiling of the detector", "true scenes as they are"),
    ):
        yield Figure(label, ceiling.get(name, {}).get("overall"), "{:.1%}", note)
    for scores in list(values.get("zero_shot", {}).get("stages", {}).values())[-1:]:
        for kind in ("continuous", "quantized"):
            note = "colour and shape of one thing, among all; no training for it"
            named = scores[kind]["object"]["top1"]
            yield Figure(f"Named zero-shot, {kind}", named, "{:.1%}", note)
    for job, measure, label in (
        ("understanding", "accuracy", "Unified model, questions"),
        ("generation", "overall", "Unified model, prompts"),
    ):
        if found := values.get(f"unified_{job}"):
            yield Figure(label, found[measure], "{:.1%}", "one model does both")


# ---- examples


@dataclass(frozen=True)
class Reconstructions:
    """Validation scenes 0, 1, … (M, 3, H, W) in [0, 1], their codes (M, N) or (M, N, n), the
    decoded codes."""

    originals: Tensor
    codes: Tensor
    copies: Tensor
    codebook_size: int

    @property
    def psnr(self) -> list[float]:
        """Decibels of each image."""
        error = (self.originals - self.copies).square().flatten(1).mean(dim=1).clamp(min=1e-10)
        return (-10 * error.log10()).tolist()


@torch.inference_mode()
def reconstruct_scenes(evidence: Evidence, count: int) -> Reconstructions | None:
    """The first `count` validation scenes through the tokenizer."""
    folder = evidence.directory / "tokenizer" / "model"
    if not (folder / "config.json").exists():
        return None
    model = VQRAEModel.from_pretrained(folder).eval()
    scenes = evidence.scenes
    originals = torch.stack([scenes.image(i) for i in range(count)]).float() / 255
    codes = model.encode(originals)
    return Reconstructions(originals, codes, model.decode(codes), model.config.codebook_size)


@dataclass(frozen=True)
class Prompt:
    """A prompt with its images; `held_out` if it names a combination that training never shows."""

    text: str
    held_out: bool
    images: list[Image.Image]
    verdicts: list[dict[str, Any]]
    """`correct` and `reason` of each image; empty where it has not been scored."""


def read_prompts(evidence: Evidence, per_family: int) -> dict[str, list[Prompt]]:
    """The first prompts of each family with their images."""
    folder = evidence.directory / "evaluation"
    scored = folder / "generation.jsonl"
    # By the last three parts of the image's path, for the folder may have moved.
    verdicts: dict[tuple[str, ...], dict[str, Any]] = {}
    for _, row in json_lines(scored) if scored.exists() else ():
        verdicts[Path(row["filename"]).parts[-3:]] = row
    names = evidence.scenes.sprites.names
    found: dict[str, dict[str, Prompt]] = {family: {} for family in FAMILIES}
    for path, record in list_samples(folder / "images"):
        family, number = found[record["tag"]], path.parts[-3]
        if number not in family:
            if len(family) == per_family:
                continue
            family[number] = Prompt(record["prompt"], holds_held_out(record, names), [], [])
        family[number].images.append(open_image(path))
        family[number].verdicts.append(verdicts.get(path.parts[-3:], {}))
    return {family: list(prompts.values()) for family, prompts in found.items() if prompts}


def count_codes(evidence: Evidence) -> np.ndarray | None:
    """How often each code of each codebook occurs in the extracted codes, int64 (n * K,)."""
    if "codes" not in evidence.seconds:
        return None
    folder = evidence.directory / "codes"
    manifest = read_manifest(folder)
    first = np.arange(manifest.num_codebooks) * manifest.codebook_size
    counts = np.zeros(manifest.num_codebooks * manifest.codebook_size, dtype=np.int64)
    for shard in sorted(folder.glob("shard-*.npy")):
        codes = np.load(shard).reshape(-1, manifest.num_codebooks) + first
        counts += np.bincount(codes.ravel(), minlength=len(counts))
    return counts
