"""Images with labels for probes: which shape stands in a cell or in an image of scenes and where, and folders of classes.

A sample is {"image": uint8 (3, H, W), "label": int64, () for the image or (N,) for its tokens with -1 where there is none}.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqrae.common.images import image_to_uint8, open_image, resize_and_crop
from vqrae.data.image_files import list_images
from vqrae.data.samples import TolerantDataset, name_hash
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import COLUMNS, place
from vqrae.data.scenes.scene import Scene, SceneObject

TEST_SHARE = 5  # every fifth image of a class, by name, when there is no folder of test images
Pair = tuple[Dataset, Dataset]  # to fit on, to ask about


class LabelledScenes(Dataset):
    """Scenes with what is asked about the object in each cell, or lone objects with their shape.

    Args:
        grid_size: tokens of a side: labels of cells; None: one label for the image, which then has a single object.
        ask: the label of an object.
    """

    def __init__(
        self,
        scenes: SceneDataset,
        count: int,
        grid_size: int | None,
        ask: Callable[[SceneObject], int],
    ) -> None:
        self.scenes, self.grid_size, self.ask = scenes, grid_size, ask
        self.indices: list[int] = []
        index = 0
        while len(self.indices) < count:
            if grid_size is not None or len(scenes.scene(index).objects) == 1:
                self.indices.append(index)
            index += 1

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.indices[index]
        scene = self.scenes.scene(number)
        if self.grid_size is None:
            label = torch.tensor(self.ask(scene.objects[0]))
        else:
            label = cell_labels(
                scene, self.grid_size, self.scenes.sampler.image_size, self.ask
            ).flatten()
        return {"image": self.scenes.image(number), "label": label}


def shape_of(item: SceneObject) -> int:
    return item.name


def place_of(item: SceneObject, image_size: int) -> int:
    """The field of a 5 x 5 board in which an object's centre lies."""
    column, row = place(item, image_size)
    return len(COLUMNS) * row + column


def cell_labels(
    scene: Scene, grid_size: int, image_size: int, ask: Callable[[SceneObject], int]
) -> Tensor:
    """The label of the object whose box holds the centre of each cell (grid, grid); -1 where there is none."""
    labels = torch.full((grid_size, grid_size), -1)
    centers = (torch.arange(grid_size) + 0.5) * image_size / grid_size
    for item in scene.objects:
        rows = (centers >= item.top) & (centers < item.top + item.size)
        columns = (centers >= item.left) & (centers < item.left + item.size)
        labels[rows[:, None] & columns[None]] = ask(item)
    return labels


def scene_tasks(
    sprites: str, image_size: int, grid_size: int, num_train: int, num_test: int
) -> dict[str, Pair]:
    """`cells`, `places` and `images`, each of training scenes and of validation scenes."""
    train, test = (
        SceneDataset(split, image_size=image_size, sprites=sprites)
        for split in ("train", "validation")
    )

    def pair(grid: int | None, ask: Callable[[SceneObject], int] = shape_of) -> Pair:
        return LabelledScenes(train, num_train, grid, ask), LabelledScenes(
            test, num_test, grid, ask
        )

    places = functools.partial(place_of, image_size=image_size)
    return {"cells": pair(grid_size), "places": pair(grid_size, places), "images": pair(None)}


class ClassFolder(TolerantDataset):
    """Some images of a folder whose sub-folders are classes (ImageNet's layout)."""

    def __init__(
        self, folder: str, paths: Sequence[Path], classes: Sequence[str], image_size: int
    ) -> None:
        super().__init__(folder)
        self.paths, self.image_size = list(paths), image_size
        self.labels = [classes.index(class_of(path, folder)) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> dict[str, Any]:
        image = resize_and_crop(open_image(self.paths[index]), self.image_size)
        return {"image": image_to_uint8(image), "label": torch.tensor(self.labels[index])}


def class_of(path: Path, folder: str | Path) -> str:
    """The name of the sub-folder that an image lies in.

    Raises:
        ValueError: when it lies in none.
    """
    parts = path.relative_to(folder).parts
    if len(parts) < 2:
        raise ValueError(f"{path} lies in no class: expected {folder}/CLASS/image")
    return parts[0]


def folder_tasks(
    folder: str, test_folder: str | None, image_size: int, num_train: int, num_test: int
) -> dict[str, Pair]:
    """`images`: of a folder of classes, and of another one or of a fifth that is held back.

    Images are taken in the order of a hash of their names, so that a part of a large folder holds all classes.

    Raises:
        ValueError: when there are not two classes, or the test folder has others.
    """

    def shuffled(source: str) -> list[Path]:
        return sorted(
            list_images(source), key=lambda path: name_hash(path.relative_to(source).as_posix())
        )

    train = shuffled(folder)
    classes = sorted({class_of(path, folder) for path in train})
    if len(classes) < 2:
        raise ValueError(
            f"{folder} holds the class {classes[0]} only, expected at least two sub-folders with images"
        )
    if test_folder is not None:
        test = shuffled(test_folder)
        if unknown := {class_of(path, test_folder) for path in test} - set(classes):
            raise ValueError(
                f"{test_folder} holds classes that {folder} does not: {', '.join(sorted(unknown)[:5])}"
            )
    else:
        seen: dict[str, int] = defaultdict(int)
        parts: tuple[list[Path], list[Path]] = ([], [])
        for path in train:
            name = class_of(path, folder)
            parts[seen[name] % TEST_SHARE == TEST_SHARE - 1].append(path)
            seen[name] += 1
        train, test = parts
    if not test:
        raise ValueError(
            f"{folder} holds fewer than {TEST_SHARE} images of each class: give more, or test_data="
        )
    first = ClassFolder(folder, train[:num_train], classes, image_size)
    return {
        "images": (first, ClassFolder(test_folder or folder, test[:num_test], classes, image_size))
    }
