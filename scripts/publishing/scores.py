"""What evaluations measured of a model: their JSON files, read for its card.

A file counts only when it names these very weights, by their fingerprint.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqrae.common.files import read_json
from vqrae.common.run import read_metrics
from vqrae.data.scenes.language import FAMILIES

LARGEST_FILE = 20_000_000  # bytes; scores are small, rows and answers are not


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one evaluation."""

    title: str
    data: str
    """What it was measured on."""
    figures: dict[str, float]
    model: str
    """Fingerprint of the weights."""
    task: str
    """Of the hub, `task type` of a result."""
    notes: list[str] = field(default_factory=list)
    image: Path | None = None


def find_evaluations(folders: list[Path], fingerprint: str) -> tuple[list[Evaluation], list[Path]]:
    """Evaluations of these weights, and the files that are about others or do not say."""
    found: list[Evaluation] = []
    others: list[Path] = []
    for path in score_files(folders):
        stored = read_json(path)
        if not isinstance(stored, dict):
            continue
        for read in READERS:
            evaluations = [each for each in read(stored, path) if each.figures]
            mine = [each for each in evaluations if each.model == fingerprint]
            found += mine
            others += [path] if evaluations and not mine else []
    return found, others


def score_files(folders: list[Path]) -> list[Path]:
    """JSON files of evaluations, also one folder below."""
    paths: list[Path] = []
    for folder in folders:
        paths += sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    return [path for path in paths if path.stat().st_size < LARGEST_FILE]


def numbers(stored: dict[str, Any], *names: str) -> dict[str, float]:
    """Those of the named values that were measured."""
    return {name: stored[name] for name in names if isinstance(stored.get(name), int | float)}


# ---- what each evaluation's file holds; nothing for the file of another


def reconstruction(stored: dict[str, Any], path: Path) -> Iterator[Evaluation]:
    """PSNR, rFID, … of a tokenizer."""
    if "psnr" in stored and "protocol" in stored:
        protocol, images = stored["protocol"], stored["num_images"]
        image = path.with_suffix(".png")
        yield Evaluation(
            title="Reconstruction",
            data=f"{images} images of {stored['data']}, {stored['split']}",
            figures=numbers(stored, "psnr", "ssim", "lpips_vgg", "rfid", "inception_score")
            | numbers(stored, "codebook_usage"),
            model=stored["tokenizer"],
            task="image-to-image",
            notes=[
                f"protocol {protocol['name']}, {stored['image_size']} px, SSIM "
                f"{stored['ssim_variant']}"
            ],
            image=image if image.is_file() else None,
        )


def stages(stored: dict[str, Any], path: Path) -> Iterator[Evaluation]:
    """Zero-shot, or what features hold."""
    is_zero_shot = stored.get("benchmark") == "zero-shot"
    for scores in stored.get("stages", {}).values():
        yield Evaluation(
            title="Zero-shot" if is_zero_shot else "What features and codes hold",
            data=str(stored["data"]),
            figures=flat({key: value for key, value in scores.items() if key != "tokenizer"}),
            model=scores["tokenizer"],
            task="zero-shot-image-classification" if is_zero_shot else "image-feature-extraction",
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, by the names on the way to them."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def geneval(stored: dict[str, Any], path: Path) -> Iterator[Evaluation]:
    """GenEval's families, of scenes or official."""
    if str(stored.get("benchmark", "")).startswith("GenEval"):
        manifest = stored["manifest"]
        notes = [f"detector {manifest['detector']}"]
        if "intervals" in stored:
            low, high = stored["intervals"]["overall"]
            notes.append(f"95 % interval of overall {low:.2f} to {high:.2f}")
        yield Evaluation(
            title=stored["benchmark"],
            data=f"{stored['num_images']} images, prompts {manifest['suite']}",
            figures=numbers(stored, "overall", *FAMILIES),
            model=str(generator_of(manifest)),
            task="text-to-image",
            notes=notes,
        )


def dpg(stored: dict[str, Any], path: Path) -> Iterator[Evaluation]:
    """DPG-Bench and its categories."""
    if "dpg" in stored:
        yield Evaluation(
            title=stored["benchmark"],
            data=f"{stored['num_scored']} prompts, judge {stored['manifest']['judge']}",
            figures=numbers(stored, "dpg") | stored["categories"],
            model=str(generator_of(stored["manifest"])),
            task="text-to-image",
        )


def generator_of(manifest: dict[str, Any]) -> str | None:
    """Fingerprint of what made the images, which earlier versions called pictures."""
    return (manifest.get("images") or manifest.get("pictures") or {}).get("generator")


def questions(stored: dict[str, Any], path: Path) -> Iterator[Evaluation]:
    """Questions about scenes; files of before their fingerprints count for no model."""
    if "blind_accuracy" in stored:
        yield Evaluation(
            title="Questions about scenes",
            data=f"{stored['num_questions']} questions about {stored['num_images']} images",
            figures=numbers(stored, "accuracy", "held_out", "blind_accuracy", "no_image_accuracy"),
            model=str(stored.get("settings", {}).get("model")),
            task="visual-question-answering",
        )


def benchmarks(stored: dict[str, Any], path: Path) -> Iterator[Evaluation]:
    """A benchmark of lmms-eval."""
    if "score" in stored and "task" in stored:
        yield Evaluation(
            title=f"lmms-eval, {stored['task']['name']}",
            data=f"{stored['num_samples']} questions",
            figures=numbers(stored, "score"),
            model=str(stored["manifest"]["fingerprints"].get("model")),
            task="visual-question-answering",
        )


READERS: list[Callable[[dict[str, Any], Path], Iterator[Evaluation]]] = [
    reconstruction,
    stages,
    geneval,
    dpg,
    questions,
    benchmarks,
]


def retrieval(run: Path, fingerprint: str) -> list[Evaluation]:
    """What the pretraining of an encoder measured at its end."""
    for row in reversed(read_metrics(run)):
        if figures := numbers(row, "retrieval_accuracy"):
            return [
                Evaluation(
                    title="Images that find their own caption",
                    data="100 held-out scenes",
                    figures=figures,
                    model=fingerprint,
                    task="zero-shot-image-classification",
                )
            ]
    return []
