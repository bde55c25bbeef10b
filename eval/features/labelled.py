"""Images with labels for probes: shapes and places of objects in scenes, or folders of classes.

A sample is {"image": uint8 (3, H, W), "label": int64}. The label is () for the image, or (N,) for
its tokens, -1 where there is none.
"""

from collections import defaultdict
from collections.abc import Callable
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
Task = tuple[Dataset, Dataset]  # to fit on, to ask about
Ask = Callable[[SceneObject], int]


# ---- scenes


class LabelledScenes(Dataset):
    """Scenes with a label for the object in each cell, or scenes of one object with its label.

    Args:
        grid_size: tokens of a side: labels of cells; None: one label for the image.
        ask: the label of an object.
    """

    def __init__(self, scenes: SceneDataset, count: int, grid_size: int | None, ask: Ask) -> None:
        self.scenes = scenes
        self.grid_size, self.ask = grid_size, ask
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
            size = self.scenes.sampler.image_size
            label = cell_labels(scene, self.grid_size, size, self.ask).flatten()
        return {"image": self.scenes.image(number), "label": label}


def cell_labels(scene: Scene, grid_size: int, image_size: int, ask: Ask) -> Tensor:
    """The label of the object whose box holds the centre of each cell (grid, grid), or -1."""
    labels = torch.full((grid_size, grid_size), -1)
    centers = (torch.arange(grid_size) + 0.5) * image_size / grid_size
    for item in scene.objects:
        rows = (centers >= item.top) & (centers < item.top + item.size)
        columns = (centers >= item.left) & (centers < item.left + item.size)
        labels[rows[:, None] & columns[None]] = ask(item)
    return labels


def scene_tasks(
    sprites: str, image_size: int, grid_size: int, num_train: int, num_test: int
) -> dict[str, Task]:
    """`cells`, `places` and `images`, each of training scenes and of validation scenes."""
    train = SceneDataset("train", image_size=image_size, sprites=sprites)
    test = SceneDataset("validation", image_size=image_size, sprites=sprites)

    def shape_of(item: SceneObject) -> int:
        return item.name

    def place_of(item: SceneObject) -> int:
        """The field of a 5 x 5 board that holds the object's centre."""
        column, row = place(item, image_size)
        return len(COLUMNS) * row + column

    asked: dict[str, tuple[int | None, Ask]] = {
        "cells": (grid_size, shape_of),
        "places": (grid_size, place_of),
        "images": (None, shape_of),
    }
    tasks: dict[str, Task] = {}
    for name, (grid, ask) in asked.items():
        known = LabelledScenes(train, num_train, grid, ask)
        tasks[name] = (known, LabelledScenes(test, num_test, grid, ask))
    return tasks


# ---- folders of classes


class ClassFolder(TolerantDataset):
    """Images below a folder whose sub-folders are classes (ImageNet's layout).

    Images are in the order of a hash of their names, so that a part of them holds all classes.
    """

    def __init__(self, folder: str, image_size: int) -> None:
        super().__init__(folder)
        self.image_size = image_size
        names = {path: path.relative_to(folder).as_posix() for path in list_images(folder)}
        self.paths = sorted(names, key=lambda path: name_hash(names[path]))
        for name in names.values():
            if "/" not in name:
                raise ValueError(f"{folder}/{name} is in no class: expected {folder}/CLASS/image")
        self.classes = sorted({name.partition("/")[0] for name in names.values()})

    def __len__(self) -> int:
        return len(self.paths)

    def class_of(self, path: Path) -> str:
        return path.relative_to(self.source).parts[0]

    def read(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        image = resize_and_crop(open_image(path), self.image_size)
        label = torch.tensor(self.classes.index(self.class_of(path)))
        return {"image": image_to_uint8(image), "label": label}


def folder_tasks(
    folder: str, test_folder: str | None, image_size: int, num_train: int, num_test: int
) -> dict[str, Task]:
    """`images`: of a folder of classes, and of another one or of a fifth that is held back.

    Raises:
        ValueError: when there are not two classes, or the test folder has others.
    """
    train = ClassFolder(folder, image_size)
    test = ClassFolder(test_folder or folder, image_size)
    if len(train.classes) < 2:
        raise ValueError(
            f"{folder} holds the class {train.classes[0]} only, expected at least two sub-folders "
            "with images"
        )
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise ValueError(
            f"{test_folder} holds classes that {folder} does not: {', '.join(unknown[:5])}"
        )
    if test_folder is None:
        by_class: dict[str, list[Path]] = defaultdict(list)
        for path in train.paths:
            by_class[train.class_of(path)].append(path)
        held_out: set[Path] = set()
        for paths in by_class.values():
            held_out.update(paths[TEST_SHARE - 1 :: TEST_SHARE])
        if not held_out:
            raise ValueError(
                f"{folder} holds fewer than {TEST_SHARE} images of each class: give more, or "
                "test_data="
            )
        test.paths = [path for path in train.paths if path in held_out]
        train.paths = [path for path in train.paths if path not in held_out]
    train.paths = train.paths[:num_train]
    test.paths = test.paths[:num_test]
    test.classes = train.classes
    return {"images": (train, test)}
