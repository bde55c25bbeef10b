"""What the tokenizer's training did to its features: are they still the original encoder's, and what do the codes keep?

    python -m vqrae.eval.features model=runs/tokenizer output=features.json
    python -m vqrae.eval.features model=runs/tokenizer data=imagenet/train test_data=imagenet/val num_train=50000 output=…

For each stage of a run: the cosine of features with those of the original encoder at the same place, beside the cosine with
another picture's (features share a large mean, so a high cosine alone says little); and how well nearest neighbours and a
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
from vqrae.common.cli import parse_arguments, progress_line
from vqrae.common.errors import run_main
from vqrae.common.files import weights_fingerprint, write_json, write_text
from vqrae.common.run import package_versions, quiet_libraries
from vqrae.data.sources import fingerprint, source_kind
from vqrae.eval.labelled import Pair, folder_tasks, scene_tasks
from vqrae.eval.networks import NotMeasured, original_tokenizer
from vqrae.eval.probes import Samples, knn_accuracy, linear_accuracy, majority_share
from vqrae.eval.tables import markdown_table
from vqrae.tokenizer import VQRAEModel

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
    """Folder of test pictures with the same classes; None: every fifth picture of each class."""
    num_train: int = 1000
    """Pictures that probes learn from."""
    num_test: int = 500
    """Pictures that probes are asked about."""
    neighbors: int = 20
    """Of the nearest-neighbour probe."""
    original_encoder: str | None = None
    """Tokenizer whose encoder is the original one; None: stage 1 of the run directory."""
    batch_size: int = 64
    """Pictures of one pass."""
    num_workers: int = 0
    """Processes that read pictures."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_test, self.neighbors, self.batch_size) < 1:
            raise ValueError("num_train, num_test, neighbors and batch_size must be positive")


def stages(model: str) -> dict[str, str]:
    """Folders of a run directory's finished stages by name, or of the only tokenizer there is."""
    found = {name: Path(model) / name / "model" for name in ("stage1", "stage2")}
    return {name: str(folder) for name, folder in found.items() if folder.is_dir()} or {"model": resolve_model(model)}


def batches(dataset: Dataset, config: FeaturesConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) in [0, 1] with their labels."""
    for batch in DataLoader(dataset, config.batch_size, num_workers=config.num_workers):
        yield batch["image"].to(device).float() / 255, batch["label"].to(device)


@torch.inference_mode()
def extract(model: VQRAEModel, dataset: Dataset, config: FeaturesConfig) -> dict[str, Samples]:
    """Samples of each of `KINDS`: labelled tokens as they are, labelled pictures as the mean over their tokens."""
    parts: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    labels: list[Tensor] = []
    for images, label in batches(dataset, config, model.device):
        features = model.encode_features(images).float()
        quantized = model.quantizer(model.project(features)).quantized
        chosen = label >= 0
        for kind, tokens in zip(KINDS, (features, quantized), strict=True):
            parts[kind].append(tokens[chosen] if label.ndim == 2 else tokens.mean(1))
        labels.append(label[chosen])
    return {kind: Samples(torch.cat(parts[kind]), torch.cat(labels)) for kind in KINDS}


@torch.inference_mode()
def teacher_cosines(model: VQRAEModel, original: VQRAEModel, dataset: Dataset, config: FeaturesConfig) -> dict[str, float]:
    """Mean cosine of features with the original encoder's, and with the original's of the image before at the same place.

    NaN for the latter where there is a single image.
    """
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    before: list[Tensor] = []  # the original's features of the last image of the batch before
    for images, _ in batches(dataset, config, model.device):
        ours, theirs = (tokenizer.encode_features(images).float() for tokenizer in (model, original))
        others = torch.cat([*before, theirs[:-1]])
        for kind, (mine, other) in enumerate(((ours, theirs), (ours[len(ours) - len(others) :], others))):
            cosines = F.cosine_similarity(mine, other, dim=-1).double()
            sums[kind] += cosines.sum().cpu()
            counts[kind] += cosines.numel()
        before = [theirs[-1:]]
    own_image, other_image = (sums / counts).tolist()
    return {"teacher_cosine": own_image, "teacher_cosine_other_picture": other_image}


def probe(model: VQRAEModel, tasks: dict[str, Pair], config: FeaturesConfig) -> dict[str, Any]:
    """Accuracies by task, kind of features and probe, beside the share of the most frequent class."""
    scores: dict[str, Any] = {}
    for task, (known, asked) in tasks.items():
        train, test = extract(model, known, config), extract(model, asked, config)
        some = test[KINDS[0]]
        scores[task] = {"chance": majority_share(some), "samples": [len(train[KINDS[0]].labels), len(some.labels)]}
        for kind in KINDS:
            knn = knn_accuracy(train[kind], test[kind], k=config.neighbors)
            scores[task][kind] = {"knn": knn, "linear": linear_accuracy(train[kind], test[kind])}
    return scores


def evaluate_features(config: FeaturesConfig) -> dict[str, Any]:
    """All scores: {stages: {name: {tokenizer, teacher_cosine…, tasks}}, not_measured, and what they were measured on}."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    not_measured: dict[str, str] = {}
    original: VQRAEModel | None = None
    try:
        original = original_tokenizer(config.model, config.original_encoder).to(device).eval()
    except NotMeasured as error:
        not_measured["teacher_cosine"] = str(error)
    found = stages(config.model)
    progress = progress_line("features")
    result: dict[str, Any] = {}
    for done, (name, folder) in enumerate(found.items()):
        progress(done, len(found))
        model = VQRAEModel.from_pretrained(folder).to(device).eval()
        tasks = labelled_tasks(config, model)
        cosines = teacher_cosines(model, original, tasks["pictures"][1], config) if original is not None else {}
        identity = weights_fingerprint(folder) if Path(folder).is_dir() else folder
        result[name] = {"tokenizer": identity, **cosines, "tasks": probe(model, tasks, config)}
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
        return scene_tasks(config.data.partition(":")[2] or "shapes", image_size, model.config.grid_size, *sizes)
    if kind == "folder":
        return folder_tasks(config.data, config.test_data, image_size, *sizes)
    raise ValueError(f"{config.data} has no classes: give scenes, or a folder whose sub-folders are classes")


def markdown(values: dict[str, Any]) -> str:
    """One row for each stage and kind of features."""
    tasks = next(iter(values["stages"].values()))["tasks"]
    header = ["stage", "features", "teacher cosine (another picture's)"]
    header += [f"{task}, {name}" for task in tasks for name in (f"{values['neighbors']}-NN", "linear")]
    rows = []
    for stage, scores in values["stages"].items():
        for kind in KINDS:
            cosine = ""
            if kind == "continuous" and "teacher_cosine" in scores:
                cosine = f"{scores['teacher_cosine']:.4f} ({scores['teacher_cosine_other_picture']:.4f})"
            accuracies = [f"{scores['tasks'][task][kind][name]:.1%}" for task in tasks for name in ("knn", "linear")]
            rows.append([stage, kind, cosine, *accuracies])
    chances = ", ".join(f"{task} {scores['chance']:.1%} of {scores['samples'][1]}" for task, scores in tasks.items())
    missing = [f"{name} not measured: {reason}" for name, reason in values["not_measured"].items()]
    lines = ["# Features", "", *markdown_table(header, rows), "", f"The most frequent class: {chances}.", *missing]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(FeaturesConfig, argv)
    quiet_libraries()
    values = evaluate_features(config)
    text, output = markdown(values), Path(config.output)
    write_json(output, values)
    write_text(output.with_suffix(".md"), text)
    print(f"{text}->  {output}")


if __name__ == "__main__":
    run_main(main)
