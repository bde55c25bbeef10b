"""Images with the names of what they show, and with their captions.

A name is said by several prompts. In the embedded sets an image is one cell of a table, such as
shapes by colours, whose texts are the prompts of both: a shape is said with every colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqrae.common.config import parse_yaml
from vqrae.common.files import read_json
from vqrae.data.emoji import BACKGROUNDS, EmojiDataset
from vqrae.data.samples import FileSplit
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import with_article
from vqrae.data.scenes.scene import COLOR_NAMES, SceneObject
from vqrae.data.scenes.sprites import load_sprites
from vqrae.data.sources import Samples, open_pairs, source_kind
from vqrae.eval.features.labelled import ClassFolder, LabelledScenes

SCENES = 1000  # that are asked about, where the configuration does not say
TEMPLATES = Path(__file__).with_name("templates.yaml")


@dataclass(frozen=True)
class Labelled:
    """Images to be named."""

    dataset: Dataset
    """{"image": uint8 (3, H, W), "label": int64}; a label is row * `columns` + column."""
    texts: list[str]
    """The prompts, row by row of a table."""
    rows: int
    columns: int
    """Of the labels; 1: they name the row alone."""
    asked: dict[str, str]
    """Names of the questions, and what a class is: `row`, `column` or `cell`."""


def labels_of(labels: Tensor, columns: int, kind: str) -> Tensor:
    """What of a label is asked for, see `Labelled`."""
    return {"row": labels // columns, "column": labels % columns, "cell": labels}[kind]


def prompts_of(embeddings: Tensor, kind: str) -> Tensor:
    """Embeddings of the table of texts (rows, columns, P) -> prompts of the classes (C, T, P)."""
    if kind == "cell":
        return embeddings.flatten(0, 1)[:, None]
    return embeddings.transpose(0, 1) if kind == "column" else embeddings


def open_labelled(
    data: str, image_size: int, count: int | None, class_names: str | None
) -> Labelled | None:
    """The images of a source that have names; None for a source without."""
    kind = source_kind(data)
    if kind == "scenes":
        return _scenes(data.partition(":")[2] or "shapes", image_size, count or SCENES)
    if kind == "emoji":
        return _emoji(image_size, count)
    if kind == "folder":
        return _folder(data, image_size, count, class_names)
    return None


def open_captions(
    data: str, image_size: int, count: int | None, split: FileSplit
) -> Samples | None:
    """The images of a source that have captions, {"image", "caption"}; None for a folder."""
    if source_kind(data) == "folder":
        return None
    return open_pairs(data, detailed=True, image_size=image_size, size=count, split=split)


def _scenes(sprites: str, image_size: int, count: int) -> Labelled:
    names = load_sprites(sprites).names

    def cell(item: SceneObject) -> int:
        return item.name * len(COLOR_NAMES) + item.color

    scenes = SceneDataset("validation", image_size=image_size, sprites=sprites)
    things = [with_article(f"{color} {name}") for name, color in product(names, COLOR_NAMES)]
    return Labelled(
        dataset=LabelledScenes(scenes, count, None, cell),
        texts=[f"a photo of {thing}" for thing in things],
        rows=len(names),
        columns=len(COLOR_NAMES),
        asked={"shape": "row", "color": "column", "object": "cell"},
    )


class LabelledEmoji(Dataset):
    """Emoji, each a class of its own, on a background."""

    def __init__(self, emoji: EmojiDataset) -> None:
        self.emoji = emoji

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, _ = self.emoji.emoji[index]
        column = list(BACKGROUNDS).index(self.emoji.background(file, epoch=0))
        label = torch.tensor(index * len(BACKGROUNDS) + column)
        return {"image": self.emoji[index]["image"], "label": label}


def _emoji(image_size: int, count: int | None) -> Labelled:
    emoji = EmojiDataset(image_size=image_size, split="validation", size=count)
    names = [name for _, name in emoji.emoji]
    return Labelled(
        dataset=LabelledEmoji(emoji),
        texts=[f"{name} on a {color} background" for name, color in product(names, BACKGROUNDS)],
        rows=len(names),
        columns=len(BACKGROUNDS),
        asked={"emoji": "row", "background": "column"},
    )


def _folder(folder: str, image_size: int, count: int | None, class_names: str | None) -> Labelled:
    dataset = ClassFolder(folder, image_size)
    names = read_names(class_names, dataset.classes)
    dataset.paths = dataset.paths[:count]
    templates: list[str] = parse_yaml(TEMPLATES.read_text(encoding="utf-8"))
    return Labelled(
        dataset=dataset,
        texts=[template.format(name) for name, template in product(names, templates)],
        rows=len(names),
        columns=1,
        asked={"class": "row"},
    )


def read_names(file: str | None, folders: Sequence[str]) -> list[str]:
    """The names of classes, in the order of their folders.

    Args:
        file: a name a line, in the order of the folders, or a .json file of {folder: name}; None:
            the folders carry the names.

    Raises:
        ValueError: when the file does not name every folder.
    """
    if file is None:
        return [folder.replace("_", " ") for folder in folders]
    if file.endswith(".json"):
        named = read_json(file)
        if missing := [folder for folder in folders if folder not in named]:
            raise ValueError(f"{file} names no class of the folders {', '.join(missing[:5])}")
        return [named[folder] for folder in folders]
    names = Path(file).read_text(encoding="utf-8").splitlines()
    if len(names) != len(folders):
        raise ValueError(
            f"{file} holds {len(names)} names, expected one a line for each of the "
            f"{len(folders)} folders, in their order"
        )
    return names
