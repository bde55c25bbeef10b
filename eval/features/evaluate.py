"""What the training of a tokenizer did to its features, and what the codes keep of them.

    python -m vqrae.eval.features.evaluate model=runs/tokenizer output=features.json
    python -m vqrae.eval.features.evaluate model=runs/tokenizer output=features.json \
        data=imagenet/train test_data=imagenet/val num_train=50000

For each stage of a run: the cosine of its features with those of the original encoder at the same
place, next to the cosine with another image's (features share a large mean, so a high cosine alone
says little); and how well nearest neighbours and a linear map read labels off the continuous
features and off the code vectors.

Shapes: B batch, N tokens, M samples, D feature width, E codebook width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vqrae.common import run
from vqrae.common.checkpoints import finished_stages, model_fingerprint
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process, sum_over_processes
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, write_text
from vqrae.common.run import package_versions, quiet_libraries
from vqrae.data.sources import fingerprint, source_kind
from vqrae.eval.features.labelled import Task, folder_tasks, scene_tasks
from vqrae.eval.features.probes import (
    LabelledFeatures,
    knn_accuracy,
    linear_accuracy,
    majority_share,
)
from vqrae.eval.reconstruction.networks import NotMeasured, original_tokenizer
from vqrae.eval.sharding import batch_indices, gather, processes, progress_of_main
from vqrae.tokenizer.modeling import VQRAEModel

KINDS = ("continuous", "quantized")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Probe a tokenizer's features, continuous and quantized, and compare them with its original
    encoder's."""

    model: str
    """Tokenizer: run directory (each finished stage is probed), checkpoint folder or hub id."""
    output: str
    """JSON file of the scores; a Markdown table is written next to it."""
    data: str = "scenes"
    """scenes, scenes:emoji, or a folder whose sub-folders are classes."""
    test_data: str | None = None
    """Folder of test images with the same classes; None: every fifth image of each class."""
    num_train: int = 1000
    """Images that probes learn from."""
    num_test: int = 500
    """Images that probes are asked about."""
    neighbors: int = 20
    """Of the nearest-neighbour probe."""
    original_encoder: str | None = None
    """Tokenizer whose encoder is the original one; None: stage 1 of the run directory."""
    batch_size: int = 64
    """Images of one pass."""
    num_workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        check_range(self, "num_workers", low=0)
        check_range(self, "num_train", "num_test", "neighbors", "batch_size", low=1)


# ---- data


def labelled_tasks(config: FeaturesConfig, model: VQRAEModel) -> dict[str, Task]:
    """What is asked of the features, at the model's size."""
    kind, sizes = source_kind(config.data), (config.num_train, config.num_test)
    image_size = model.config.image_size
    if kind == "scenes":
        sprites = config.data.partition(":")[2] or "shapes"
        return scene_tasks(sprites, image_size, model.config.grid_size, *sizes)
    if kind == "folder":
        return folder_tasks(config.data, config.test_data, image_size, *sizes)
    raise ValueError(
        f"{config.data} has no classes: give scenes, or a folder whose sub-folders are classes"
    )


def read_batches(
    dataset: Dataset, batches: Iterable[list[int]], num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images (B, 3, H, W) in [0, 1], with their labels."""
    for batch in DataLoader(dataset, batch_sampler=batches, num_workers=num_workers):
        yield batch["image"].to(device).float() / 255, batch["label"].to(device)


# ---- scores


@torch.inference_mode()
def teacher_cosines(
    model: VQRAEModel, original: VQRAEModel, dataset: Dataset, config: FeaturesConfig
) -> dict[str, float | None]:
    """Mean cosine of features with the original encoder's of the same image and of the one before.

    Both are taken at the same place. The second is None for a data set of one image. Several
    processes share the work, and all get the means.
    """
    total: int = len(dataset)  # type: ignore[arg-type]  # every source of ours has a length
    # Each batch begins with the image before it; the last image comes before the first.
    chunks = batch_indices(total, config.batch_size)
    batches = [[(chunk[0] - 1) % total, *chunk] for chunk in chunks]
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    for images, _ in read_batches(dataset, batches, config.num_workers, model.device):
        features_BND = model.encode_features(images[1:]).float()
        original_BND = original.encode_features(images).float()
        own = F.cosine_similarity(features_BND, original_BND[1:], dim=-1).double()
        other = F.cosine_similarity(features_BND, original_BND[:-1], dim=-1).double()
        sums += torch.stack([own.sum(), other.sum(), sums.new_tensor(own.numel())])
    own, other, count = sum_over_processes(sums).tolist()
    return {
        "teacher_cosine": own / count,
        "teacher_cosine_other_image": None if total == 1 else other / count,
    }


@torch.inference_mode()
def extract(
    model: VQRAEModel, dataset: Dataset, config: FeaturesConfig
) -> dict[str, LabelledFeatures]:
    """Features of each of `KINDS`: of labelled tokens, or of labelled images the mean over tokens.

    Several processes share the work, and all get all samples.
    """
    total: int = len(dataset)  # type: ignore[arg-type]
    batches = batch_indices(total, config.batch_size)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, labels in read_batches(dataset, batches, config.num_workers, model.device):
        fused = model.encode_fused(images).float()
        continuous = fused[..., : model.config.feature_dim]
        quantized = model.quantizer(model.project(fused)).quantized
        chosen = labels >= 0
        if labels.ndim == 2:
            continuous, quantized = continuous[chosen], quantized[chosen]
        else:
            continuous, quantized = continuous.mean(1), quantized.mean(1)
        parts.append((labels[chosen].cpu(), continuous.cpu(), quantized.cpu()))
    columns = zip(*gather(parts), strict=True)
    labels_M, *features = (torch.cat(column).to(model.device) for column in columns)
    return {
        kind: LabelledFeatures(part, labels_M) for kind, part in zip(KINDS, features, strict=True)
    }


def evaluate_features(
    model: VQRAEModel, original: VQRAEModel | None, config: FeaturesConfig
) -> dict[str, Any]:
    """Scores of a tokenizer: teacher_cosine and teacher_cosine_other_image, if there is an original
    encoder, and `tasks`, see `probe`.

    Raises:
        ValueError: for fewer images to learn from than neighbours.
    """
    tasks = labelled_tasks(config, model)
    known, asked = tasks["images"]
    count: int = len(known)  # type: ignore[arg-type]
    if count < config.neighbors:  # before anything is computed
        raise ValueError(
            f"got {count} images to learn from, expected at least neighbors={config.neighbors}"
        )
    cosines: dict[str, float | None] = {}
    if original is not None:
        cosines = teacher_cosines(model, original, asked, config)
    return {**cosines, "tasks": probe(model, tasks, config)}


def probe(model: VQRAEModel, tasks: dict[str, Task], config: FeaturesConfig) -> dict[str, Any]:
    """Accuracies by task, kind of features and probe, with the share of the most frequent class."""
    scores: dict[str, Any] = {}
    for task, (known, asked) in tasks.items():
        train, test = extract(model, known, config), extract(model, asked, config)
        labels, asked_labels = train["continuous"].labels, test["continuous"].labels
        scores[task] = {
            "chance": majority_share(test["continuous"]),
            "samples": [len(labels), len(asked_labels)],
        }
        for kind in KINDS:
            scores[task][kind] = {
                "knn": knn_accuracy(train[kind], test[kind], k=config.neighbors),
                "linear": linear_accuracy(train[kind], test[kind]),
            }
    return scores


# ---- the command


def feature_table(values: dict[str, Any]) -> str:
    """One row for each stage and kind of features."""
    tasks = next(iter(values["stages"].values()))["tasks"]
    header = ["stage", "features", "teacher cosine (another image's)"]
    for task in tasks:
        header += [f"{task}, {values['neighbors']}-NN", f"{task}, linear"]
    rows = []
    for stage, scores in values["stages"].items():
        cosine = ""
        if "teacher_cosine" in scores:
            other = scores["teacher_cosine_other_image"]
            cosine = f"{scores['teacher_cosine']:.4f} ({'—' if other is None else f'{other:.4f}'})"
        for kind in KINDS:
            row = [stage, kind, cosine if kind == "continuous" else ""]
            for task in tasks:
                found = scores["tasks"][task][kind]
                row += [f"{found['knn']:.1%}", f"{found['linear']:.1%}"]
            rows.append(row)
    chances = [f"{t} {s['chance']:.1%} of {s['samples'][1]}" for t, s in tasks.items()]
    missing = [f"{name} not measured: {reason}" for name, reason in values["not_measured"].items()]
    lines = ["# Features", "", *markdown_table(header, rows), ""]
    lines += [f"The most frequent class: {', '.join(chances)}.", *missing]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    config = parse(FeaturesConfig, argv)
    quiet_libraries()
    not_measured: dict[str, str] = {}
    with processes(config.device) as device:
        original: VQRAEModel | None = None
        try:
            original = original_tokenizer(config.model, config.original_encoder).to(device).eval()
        except NotMeasured as error:
            not_measured["teacher_cosine"] = str(error)

        folders = finished_stages(config.model)
        tokenizers = {name: model_fingerprint(folder) for name, folder in folders.items()}
        settings = {
            "tokenizers": tokenizers,
            "original_encoder": original and model_fingerprint(original.name_or_path),
            "data": [fingerprint(name) for name in (config.data, config.test_data) if name],
            "num_train": config.num_train,
            "num_test": config.num_test,
            "neighbors": config.neighbors,
        }

        def score() -> dict[str, Any]:
            found = {}
            progress = progress_of_main("features")
            for done, (stage, folder) in enumerate(folders.items()):
                progress(done, len(folders))
                model = VQRAEModel.from_pretrained(folder).to(device).eval()
                scores = evaluate_features(model, original, config)
                found[stage] = {"tokenizer": tokenizers[stage], **scores}
                if scores.get("teacher_cosine_other_image", 0) is None:
                    reason = "there is one test image: set num_test=2 or more"
                    not_measured["teacher_cosine_other_image"] = reason
            progress(len(folders), len(folders))
            return {
                "stages": found,
                "not_measured": not_measured,
                "data": settings["data"],
                "neighbors": config.neighbors,
                "packages": package_versions(),
            }

        values = run.kept(config.output, settings, score)
    if is_main_process():
        text = feature_table(values)
        write_text(Path(config.output).with_suffix(".md"), text)
        print(f"{text}->  {config.output}")


if __name__ == "__main__":
    run_main(main)
