"""Naming images that no classifier was trained for, and finding images and captions of each other.

    python -m vqrae.eval.zeroshot.evaluate model=runs/tokenizer output=zeroshot.json
    python -m vqrae.eval.zeroshot.evaluate model=runs/unitok output=zeroshot.json \
        data=imagenet/val class_names=imagenet_names.json

Images and texts are compared in the space of a tokenizer's text side, by its continuous features
and by the quantized ones, which UniTok is trained on. A tokenizer without a text side is read by
the SigLIP that its encoder came from, which knows continuous features alone: what it makes of
quantized ones says how near the decoder's input is to them.

Shapes: B batch, M images, P width of an embedding.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqrae.common.checkpoints import finished_stages, model_fingerprint
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, write_text
from vqrae.common.run import kept, package_versions, quiet_libraries
from vqrae.data.samples import FileSplit, checksum
from vqrae.data.sources import fingerprint, source_kind
from vqrae.data.word_tokenizer import describe_unknown
from vqrae.eval.features.evaluate import KINDS
from vqrae.eval.sharding import batch_indices, gather, processes, progress_of_main
from vqrae.eval.zeroshot.scores import class_vectors, ranks, recalls
from vqrae.eval.zeroshot.tasks import (
    SCENES,
    Labelled,
    labels_of,
    open_captions,
    open_labelled,
    prompts_of,
)
from vqrae.eval.zeroshot.texts import TextSide, embed_all, encoder_siglip, open_text_side
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

Scores = dict[str, dict[str, float]]  # by task, then by measure


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Name images and retrieve captions without training for it, by continuous and quantized
    features."""

    model: str
    """Tokenizer: run directory (each finished stage is scored), checkpoint folder or hub id."""
    output: str
    """JSON file of the scores; a Markdown table is written next to it."""
    data: str = "scenes"
    """scenes, scenes:emoji, emoji; a folder whose sub-folders are classes (ImageNet), to be named;
    FILE.jsonl, FILE.tar or hf:NAME with captions, to be retrieved."""
    split: Literal["auto", "validation", "all"] = "auto"
    """Which part of captioned files: their 5 % for validation, or all, which auto means."""
    num_images: int | None = None
    """Images to ask about; None: 1000 scenes, or all."""
    class_names: str | None = None
    """Of a folder: a file with a name a line, in the order of the sub-folders, or .json of
    {sub-folder: name}; None: the sub-folders are called by the names."""
    text_model: str | None = None
    """SigLIP of the encoder, for a tokenizer without a text side; None: that of the run."""
    batch_size: int = 64
    """Images of one pass."""
    num_workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        check_range(self, "num_workers", low=0)
        check_range(self, "num_images", "batch_size", low=1)


class Judge:
    """A tokenizer with its text side, and how they are asked."""

    def __init__(
        self, folder: str, text_model: str | None, config: ZeroShotConfig, device: str
    ) -> None:
        self.config = config
        self.model = VQRAEModel.from_pretrained(folder).to(device).eval()
        self.side: TextSide = open_text_side(self.model, folder, text_model)
        self.notes: list[str] = []
        """What to know of the scores."""

    @torch.inference_mode()
    def embed(self, dataset: Dataset, key: str) -> tuple[dict[str, Tensor], list[Any], list[str]]:
        """Embeddings (M, P) by kind of features; what samples hold by `key`; checksums of pixels.

        Several processes share the work, and all get all.
        """
        total: int = len(dataset)  # type: ignore[arg-type]  # every source of ours has a length
        shares = batch_indices(total, self.config.batch_size)
        progress = progress_of_main(f"zero-shot, images by {key}")
        parts: list[dict[str, Any]] = []
        loader = DataLoader(dataset, batch_sampler=shares, num_workers=self.config.num_workers)
        for done, batch in enumerate(loader, start=1):
            images = batch["image"].to(self.model.device).float() / 255
            continuous = self.model.encode_features(images)
            quantized = self.model.features_of(self.model.choose_codes(continuous))
            pixels = [checksum(image.numpy().tobytes()) for image in batch["image"]]
            part: dict[str, Any] = {"values": list(batch[key]), "pixels": pixels}
            for kind, features in zip(KINDS, (continuous, quantized), strict=True):
                part[kind] = self.side.embed_images(features).cpu()
            parts.append(part)
            progress(done, len(shares))
        gathered = gather(parts)
        embedded = {}
        for kind in KINDS:
            embedded[kind] = torch.cat([part[kind] for part in gathered])
        values = list(chain.from_iterable(part["values"] for part in gathered))
        pixels = list(chain.from_iterable(part["pixels"] for part in gathered))
        return embedded, values, pixels

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embeddings (texts, P) on the CPU."""
        if unknown := describe_unknown(self.side.text_tokenizer, texts):
            self.notes.append(unknown)
        return embed_all(self.side, texts).cpu()


def classify(judge: Judge, labelled: Labelled) -> dict[str, Scores]:
    """Top-1 and top-5 accuracy by kind of features and task, with the chance of a guess."""
    images, labels = judge.embed(labelled.dataset, "label")[:2]
    texts = judge.embed_texts(labelled.texts)
    table = texts.view(labelled.rows, -1, texts.shape[-1])
    scores: dict[str, Scores] = {kind: {} for kind in KINDS}
    for task, kind in labelled.asked.items():
        classes = class_vectors(prompts_of(table, kind))
        asked = labels_of(torch.stack(labels), labelled.columns, kind)
        right = asked[:, None] == torch.arange(len(classes))
        for features in KINDS:
            found = recalls(ranks(images[features], classes, right), "top", 1, 5)
            scores[features][task] = {**found, "chance": 1 / len(classes), "count": len(right)}
    return scores


def retrieve(judge: Judge, dataset: Dataset) -> dict[str, Scores]:
    """Recall at 1, 5 and 10 by kind of features and direction.

    Equal captions are one, and equal images: all their partners are right.
    """
    images, captions, pixels = judge.embed(dataset, "caption")
    first: dict[str, int] = {}
    for place, image in enumerate(pixels):
        first.setdefault(image, place)
    rows = {image: row for row, image in enumerate(first)}
    columns = {caption: column for column, caption in enumerate(dict.fromkeys(captions))}
    right = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for image, caption in zip(pixels, captions, strict=True):
        right[rows[image], columns[caption]] = True
    texts = judge.embed_texts(list(columns))
    scores: dict[str, Scores] = {kind: {} for kind in KINDS}
    for features in KINDS:
        unique = images[features][list(first.values())]
        for name, queries, keys, truth in (
            ("image_to_text", unique, texts, right),
            ("text_to_image", texts, unique, right.T),
        ):
            found = recalls(ranks(queries, keys, truth), "r", 1, 5, 10)
            chance = truth.double().mean().item()
            scores[features][name] = {**found, "chance": chance, "count": len(queries)}
    return scores


def evaluate(judge: Judge) -> dict[str, Scores]:
    """All scores by kind of features.

    Raises:
        ValueError: for a source with neither classes nor captions.
    """
    config = judge.config
    size = judge.model.config.image_size
    split: FileSplit = "validation" if config.split == "validation" else "all"
    is_embedded = source_kind(config.data) in ("scenes", "emoji")
    count = config.num_images
    if is_embedded:
        split, count = "validation", count or SCENES
    labelled = open_labelled(config.data, size, count, config.class_names)
    captioned = open_captions(config.data, size, count, split)
    scores: dict[str, Scores] = {kind: {} for kind in KINDS}
    parts = [classify(judge, labelled)] if labelled is not None else []
    parts += [retrieve(judge, captioned)] if captioned is not None else []
    for part in parts:
        for kind in KINDS:
            scores[kind] |= part[kind]
    return scores


# ---- the command


def zero_shot_table(values: dict[str, Any]) -> str:
    """One row for each stage and kind of features, one column for each measure."""
    stages = values["stages"]
    tasks = next(iter(stages.values()))["continuous"]
    header = ["stage", "features"]
    for task, found in tasks.items():
        header += [f"{task} {measure}" for measure in found if measure not in ("chance", "count")]
    rows = []
    for stage, scores in stages.items():
        for kind in KINDS:
            row = [stage, kind]
            for found in scores[kind].values():
                row += [f"{v:.1%}" for m, v in found.items() if m not in ("chance", "count")]
            rows.append(row)
    chances = [f"{task} {found['chance']:.1%} of {found['count']}" for task, found in tasks.items()]
    lines = ["# Zero-shot", "", *markdown_table(header, rows), ""]
    notes = [f"A guess: {', '.join(chances)}.", f"Text side: {values['text_side']}."]
    return "\n".join([*lines, *notes, *values["notes"]]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(ZeroShotConfig, argv)
    quiet_libraries()
    folders = finished_stages(config.model)
    tokenizers = {name: model_fingerprint(folder) for name, folder in folders.items()}
    text_model = config.text_model
    if VQRAEConfig.from_pretrained(next(iter(folders.values()))).text_config is None:
        text_model = text_model or encoder_siglip(Path(config.model))
    names = Path(config.class_names).read_bytes() if config.class_names else b""
    settings = {
        "tokenizers": tokenizers,
        "text_model": text_model and model_fingerprint(text_model),
        "data": fingerprint(config.data),
        "split": config.split,
        "num_images": config.num_images,
        "class_names": checksum(names),
    }
    with processes(config.device) as device:

        def score() -> dict[str, Any]:
            stages = {}
            for stage, folder in folders.items():
                judge = Judge(folder, text_model, config, device)
                stages[stage] = {"tokenizer": tokenizers[stage], **evaluate(judge)}
            return {
                "benchmark": "zero-shot",
                "stages": stages,
                "text_side": text_model or "the tokenizer's own",
                "notes": sorted(set(judge.notes)),
                "data": settings["data"],
                "packages": package_versions(),
            }

        values = kept(config.output, settings, score)
    if is_main_process():
        text = zero_shot_table(values)
        write_text(Path(config.output).with_suffix(".md"), text)
        print(f"{text}->  {config.output}")


if __name__ == "__main__":
    run_main(main)
