"""What the tokenizer's training did to its features: are they still the original encoder's, and what do the codes keep?

    python -m vqrae.eval.features.evaluate model=runs/tokenizer output=features.json
    python -m vqrae.eval.features.evaluate model=runs/tokenizer data=imagenet/train test_data=imagenet/val num_train=50000 output=…

For each stage of a run: the cosine of features with those of the original encoder at the same place, beside the cosine with
another image's (features share a large mean, so a high cosine alone says little); and how well nearest neighbours and a
linear map read labels off the continuous features and off the code vectors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vqrae.common.checkpoints import resolve_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process, sum_over_processes
from vqrae.common.errors import run_main
from vqrae.common.files import write_json, write_text
from vqrae.common.run import package_versions, quiet_libraries
from vqrae.data.sources import fingerprint, source_kind
from vqrae.eval.features.labelled import Pair, folder_tasks, scene_tasks
from vqrae.eval.features.probes import Samples, knn_accuracy, linear_accuracy, majority_share
from vqrae.eval.manifest import model_fingerprint
from vqrae.eval.reconstruction.networks import NotMeasured, original_tokenizer
from vqrae.eval.sharding import gather_strided, processes, progress_of_main, stride
from vqrae.eval.tables import markdown_table
from vqrae.tokenizer.modeling import VQRAEModel

KINDS = ("continuous", "quantized")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Probe a tokenizer's features, continuous and quantized, and compare them with its original encoder's."""

    model: str
    """Tokenizer: run directory (each finished stage is probed), checkpoint folder or hub id."""
    output: str
    """JSON file of the scores; a Markdown table goes beside it."""
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
        if min(self.num_train, self.num_test, self.neighbors, self.batch_size) < 1:
            raise ValueError("num_train, num_test, neighbors and batch_size must be positive")


def stages(model: str) -> dict[str, str]:
    """Folders of a run directory's finished stages by name, or of the only tokenizer there is."""
    found = {name: Path(model) / name / "model" for name in ("stage1", "stage2")}
    return {name: str(folder) for name, folder in found.items() if folder.is_dir()} or {
        "model": resolve_model(model)
    }


def batches(
    dataset: Dataset, config: FeaturesConfig, device: torch.device, *, after: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches of images (B, 3, H, W) in [0, 1] with their labels.

    Args:
        after: begin each batch with so many of the images before it; those before the first are the last ones.
    """
    total: int = len(dataset)  # type: ignore[arg-type]  # every source of ours has a length
    starts = range(0, total, config.batch_size)
    chunks = [
        [i % total for i in range(start - after, min(start + config.batch_size, total))]
        for start in starts
    ]
    # Whole batches are shared out, so that rounding does not depend on the number of processes.
    for batch in DataLoader(dataset, batch_sampler=stride(chunks), num_workers=config.num_workers):
        yield batch["image"].to(device).float() / 255, batch["label"].to(device)


@torch.inference_mode()
def extract(model: VQRAEModel, dataset: Dataset, config: FeaturesConfig) -> dict[str, Samples]:
    """Samples of each of `KINDS`: labelled tokens as they are, labelled images as the mean over their tokens.

    Several processes share the work, and all get all samples.
    """
    parts: list[tuple[Tensor, ...]] = []  # labels, and features of each kind
    for images, label in batches(dataset, config, model.device):
        features = model.encode_features(images).float()
        quantized = model.quantizer(model.project(features)).quantized
        chosen = label >= 0
        kinds = [
            tokens[chosen] if label.ndim == 2 else tokens.mean(1)
            for tokens in (features, quantized)
        ]
        parts.append(tuple(part.cpu() for part in (label[chosen], *kinds)))
    labels, *found = (
        torch.cat(column).to(model.device) for column in zip(*gather_strided(parts), strict=True)
    )
    return {kind: Samples(tokens, labels) for kind, tokens in zip(KINDS, found, strict=True)}


@torch.inference_mode()
def teacher_cosines(
    model: VQRAEModel, original: VQRAEModel, dataset: Dataset, config: FeaturesConfig
) -> dict[str, float | None]:
    """Mean cosine of features with the original encoder's of the same image and of the one before it, at the same place.

    The second is None for a data set of one image. Several processes share the work, and all get the means.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    for images, _ in batches(dataset, config, model.device, after=1):
        ours, theirs = (
            model.encode_features(images[1:]).float(),
            original.encode_features(images).float(),
        )
        cosines = [
            F.cosine_similarity(ours, others, dim=-1).double()
            for others in (theirs[1:], theirs[:-1])
        ]
        sums += torch.stack(
            [*(cosine.sum() for cosine in cosines), sums.new_tensor(cosines[0].numel())]
        )
    sum_over_processes(sums)
    own, other, count = sums.tolist()
    alone = len(dataset) == 1  # type: ignore[arg-type]
    return {
        "teacher_cosine": own / count,
        "teacher_cosine_other_image": None if alone else other / count,
    }


def probe(model: VQRAEModel, tasks: dict[str, Pair], config: FeaturesConfig) -> dict[str, Any]:
    """Accuracies by task, kind of features and probe, beside the share of the most frequent class."""
    scores: dict[str, Any] = {}
    for task, (known, asked) in tasks.items():
        train, test = extract(model, known, config), extract(model, asked, config)
        some = test[KINDS[0]]
        scores[task] = {
            "chance": majority_share(some),
            "samples": [len(train[KINDS[0]].labels), len(some.labels)],
        }
        for kind in KINDS:
            knn = knn_accuracy(train[kind], test[kind], k=config.neighbors)
            scores[task][kind] = {"knn": knn, "linear": linear_accuracy(train[kind], test[kind])}
    return scores


def evaluate_features(config: FeaturesConfig) -> dict[str, Any]:
    """All scores: {stages: {name: {tokenizer, teacher_cosine…, tasks}}, not_measured, and what they were measured on}."""
    with processes(config.device) as device:
        return _evaluate(config, device)


def _evaluate(config: FeaturesConfig, device: str) -> dict[str, Any]:
    not_measured: dict[str, str] = {}
    original: VQRAEModel | None = None
    try:
        original = original_tokenizer(config.model, config.original_encoder).to(device).eval()
    except NotMeasured as error:
        not_measured["teacher_cosine"] = str(error)
    found = stages(config.model)
    progress = progress_of_main("features")
    result: dict[str, Any] = {}
    for done, (name, folder) in enumerate(found.items()):
        progress(done, len(found))
        model = VQRAEModel.from_pretrained(folder).to(device).eval()
        tasks = labelled_tasks(config, model)
        known: int = len(tasks["images"][0])  # type: ignore[arg-type]
        if known < config.neighbors:  # before anything is computed
            raise ValueError(
                f"got {known} images to learn from, expected at least neighbors={config.neighbors}"
            )
        cosines = (
            teacher_cosines(model, original, tasks["images"][1], config)
            if original is not None
            else {}
        )
        if None in cosines.values():
            not_measured["teacher_cosine_other_image"] = (
                "there is one test image: set num_test=2 or more"
            )
        result[name] = {
            "tokenizer": model_fingerprint(folder),
            **cosines,
            "tasks": probe(model, tasks, config),
        }
    progress(len(found), len(found))
    names = (config.data, config.test_data)
    return {
        "stages": result,
        "not_measured": not_measured,
        "data": [fingerprint(name) for name in names if name is not None],
        "neighbors": config.neighbors,
        "packages": package_versions(),
    }


def labelled_tasks(config: FeaturesConfig, model: VQRAEModel) -> dict[str, Pair]:
    """What is asked of the features, at the model's size."""
    kind, sizes = source_kind(config.data), (config.num_train, config.num_test)
    image_size = model.config.image_size
    if kind == "scenes":
        return scene_tasks(
            config.data.partition(":")[2] or "shapes", image_size, model.config.grid_size, *sizes
        )
    if kind == "folder":
        return folder_tasks(config.data, config.test_data, image_size, *sizes)
    raise ValueError(
        f"{config.data} has no classes: give scenes, or a folder whose sub-folders are classes"
    )


def markdown(values: dict[str, Any]) -> str:
    """One row for each stage and kind of features."""
    tasks = next(iter(values["stages"].values()))["tasks"]
    header = ["stage", "features", "teacher cosine (another image's)"]
    header += [
        f"{task}, {name}" for task in tasks for name in (f"{values['neighbors']}-NN", "linear")
    ]
    rows = []
    for stage, scores in values["stages"].items():
        for kind in KINDS:
            cosine = ""
            if kind == "continuous" and "teacher_cosine" in scores:
                other = scores["teacher_cosine_other_image"]
                cosine = (
                    f"{scores['teacher_cosine']:.4f} ({'—' if other is None else f'{other:.4f}'})"
                )
            accuracies = [
                f"{scores['tasks'][task][kind][name]:.1%}"
                for task in tasks
                for name in ("knn", "linear")
            ]
            rows.append([stage, kind, cosine, *accuracies])
    chances = ", ".join(
        f"{task} {scores['chance']:.1%} of {scores['samples'][1]}" for task, scores in tasks.items()
    )
    missing = [f"{name} not measured: {reason}" for name, reason in values["not_measured"].items()]
    lines = [
        "# Features",
        "",
        *markdown_table(header, rows),
        "",
        f"The most frequent class: {chances}.",
        *missing,
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    config = parse(FeaturesConfig, argv)
    quiet_libraries()
    values = evaluate_features(config)
    if not is_main_process():
        return
    text, output = markdown(values), Path(config.output)
    write_json(output, values)
    write_text(output.with_suffix(".md"), text)
    print(f"{text}->  {output}")


if __name__ == "__main__":
    run_main(main)
