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

import hashlib
from collections.abc import Callable, Iterable, Iterator
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

Scores = dict[str, dict[str, dict[str, float]]]
"""By kind of features, task and measure."""


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
    {sub-folder: name}; None: the sub-folders carry the names."""
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


class Scored:
    """A tokenizer with its text side, and how they are asked.

    Attributes:
        tasks: what was asked, each with the `chance` of a guess and the `count` of questions.
        notes: what to know of the scores.
    """

    def __init__(
        self, folder: str, text_model: str | None, config: ZeroShotConfig, device: str
    ) -> None:
        self.config = config
        self.model = VQRAEModel.from_pretrained(folder).to(device).eval()
        self.side: TextSide = open_text_side(self.model, folder, text_model)
        self.tasks: dict[str, dict[str, float]] = {}
        self.notes: list[str] = []

    @torch.inference_mode()
    def embed(
        self, dataset: Dataset, describe: Callable[[dict[str, Any]], Iterable[Any]]
    ) -> tuple[dict[str, Tensor], list[Any]]:
        """Embeddings (M, P) by kind of features, and what `describe` says of every image.

        Several processes share the work, and all get all.
        """
        total: int = len(dataset)  # type: ignore[arg-type]  # every source of ours has a length
        shares = batch_indices(total, self.config.batch_size)
        progress = progress_of_main("zero-shot")
        parts: list[tuple[list[Tensor], list[Any]]] = []
        loader = DataLoader(dataset, batch_sampler=shares, num_workers=self.config.num_workers)
        for done, batch in enumerate(loader, start=1):
            images = batch["image"].to(self.model.device).float() / 255
            fused = self.model.encode_fused(images)
            continuous = fused[..., : self.model.config.feature_dim]
            quantized = self.model.features_of(self.model.choose_codes(fused))
            embeddings = [self.side.embed_images(part).cpu() for part in (continuous, quantized)]
            parts.append((embeddings, list(describe(batch))))
            progress(done, len(shares))
        by_batch, described = zip(*gather(parts), strict=True)
        columns = zip(*by_batch, strict=True)
        embedded = {kind: torch.cat(column) for kind, column in zip(KINDS, columns, strict=True)}
        return embedded, list(chain.from_iterable(described))

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embeddings (texts, P) on the CPU."""
        if unknown := describe_unknown(self.side.text_tokenizer, texts):
            self.notes.append(unknown)
        return embed_all(self.side, texts).cpu()


def classify(scored: Scored, labelled: Labelled) -> Scores:
    """Top-1 and top-5 accuracy."""
    images, labels = scored.embed(labelled.dataset, lambda batch: batch["label"])
    texts = scored.embed_texts(labelled.texts)
    table = texts.view(labelled.rows, -1, texts.shape[-1])
    scores: Scores = {kind: {} for kind in KINDS}
    for task, part in labelled.asked.items():
        classes = class_vectors(prompts_of(table, part))
        asked = labels_of(torch.stack(labels), labelled.columns, part)
        right = asked[:, None] == torch.arange(len(classes))
        scored.tasks[task] = {"chance": 1 / len(classes), "count": len(asked)}
        for kind in KINDS:
            scores[kind][task] = recalls(ranks(images[kind], classes, right), "top", 1, 5)
    return scores


def caption_and_pixels(batch: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The caption of every image, and a hash of its pixels."""
    for caption, image in zip(batch["caption"], batch["image"], strict=True):
        yield caption, hashlib.md5(image.numpy().tobytes()).hexdigest()


def retrieve(scored: Scored, dataset: Dataset) -> Scores:
    """Recall at 1, 5 and 10 in both directions.

    Equal captions are one, and equal images: all their partners are right.
    """
    images, pairs = scored.embed(dataset, caption_and_pixels)
    columns: dict[str, int] = {}
    rows: dict[str, int] = {}
    first: list[int] = []  # the place of each image that is not equal to one before
    for place, (caption, pixels) in enumerate(pairs):
        columns.setdefault(caption, len(columns))
        if pixels not in rows:
            rows[pixels] = len(rows)
            first.append(place)
    right = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for caption, pixels in pairs:
        right[rows[pixels], columns[caption]] = True
    texts = scored.embed_texts(list(columns))
    chance = right.double().mean().item()
    scored.tasks["image_to_text"] = {"chance": chance, "count": len(rows)}
    scored.tasks["text_to_image"] = {"chance": chance, "count": len(columns)}
    scores: Scores = {}
    for kind in KINDS:
        unique = images[kind][first]
        scores[kind] = {
            "image_to_text": recalls(ranks(unique, texts, right), "r", 1, 5, 10),
            "text_to_image": recalls(ranks(texts, unique, right.T), "r", 1, 5, 10),
        }
    return scores


def evaluate(scored: Scored) -> Scores:
    """All scores of a tokenizer."""
    config, size = scored.config, scored.model.config.image_size
    split: FileSplit = "validation" if config.split == "validation" else "all"
    count = config.num_images
    if source_kind(config.data) in ("scenes", "emoji"):
        split, count = "validation", count or SCENES
    parts = []
    if (labelled := open_labelled(config.data, size, count, config.class_names)) is not None:
        parts.append(classify(scored, labelled))
    if (captioned := open_captions(config.data, size, count, split)) is not None:
        parts.append(retrieve(scored, captioned))
    scores: Scores = {}
    for kind in KINDS:
        scores[kind] = dict(chain.from_iterable(part[kind].items() for part in parts))
    return scores


# ---- the command


def zero_shot_table(values: dict[str, Any]) -> str:
    """One row for each stage and kind of features, one column for each measure."""
    header: list[str] = []
    rows = []
    for stage, scores in values["stages"].items():
        for kind in KINDS:
            header, row = ["stage", "features"], [stage, kind]
            for task, found in scores[kind].items():
                header += [f"{task} {measure}" for measure in found]
                row += [f"{value:.1%}" for value in found.values()]
            rows.append(row)
    tasks = values["tasks"].items()
    chances = [f"{task} {asked['chance']:.1%} of {asked['count']}" for task, asked in tasks]
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
                scored = Scored(folder, text_model, config, device)
                stages[stage] = {"tokenizer": tokenizers[stage], **evaluate(scored)}
            return {
                "benchmark": "zero-shot",
                "stages": stages,
                "tasks": scored.tasks,
                "text_side": text_model or "the tokenizer's own",
                "notes": sorted(set(scored.notes)),
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
