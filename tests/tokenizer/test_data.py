from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqrae.tokenizer.config import DataConfig, StageConfig
from vqrae.tokenizer.data import StageImages, cutmix


def mixed(count: int = 64) -> torch.Tensor:
    """Which of two images every cell of an 8 x 8 grid shows, in `count` mixtures (n, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    own, other = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.ones(3, 32, 32, dtype=torch.uint8)
    result = torch.stack([cutmix(own, other, generator) for _ in range(count)])
    cells = result[:, 0, ::4, ::4]
    assert torch.equal(
        result, cells[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(result)
    )
    return cells.bool()


def test_cutmix_puts_one_rectangle_of_another_image_into_an_image() -> None:
    foreign = mixed()
    rows, columns = foreign.any(2), foreign.any(1)
    assert torch.equal(foreign, rows[:, :, None] & columns[:, None])
    for side in (rows, columns):
        assert side.sum(1).min() >= 2
        assert side.sum(1).max() <= 6
        assert torch.equal(
            side.int().diff(dim=1).clamp(min=0).sum(1) + side[:, 0], torch.ones(64)
        )  # in one piece
        assert side.any(0).all()  # everywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in two classes, dark ones and bright ones, each with a grey of its own and a white left half."""
    root = tmp_path_factory.mktemp("images")
    for i in range(40):
        pixels = np.full((8, 8, 3), i * 4 + 20 * (i >= 20), dtype=np.uint8)
        pixels[:, :4] = 255
        path = root / ("bright" if i >= 20 else "dark") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def random_images(
    config: DataConfig, *, micro: int = 4, rank: int = 0, world_size: int = 1, seed: int = 0
) -> StageImages:
    batch: dict[str, Any] = {"max_steps": 9, "global_batch_size": 8, "micro_batch_size": micro}
    stage = StageConfig(**batch, freeze_encoder=True, decoder_lr=1e-3, end_lr=1e-3)
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": torch.device("cpu")}
    return StageImages(config, stage, size=8, seed=seed, number=1, **place)


def stream(batches: StageImages, count: int, start: int = 0) -> list[torch.Tensor]:
    """The first images of a process."""
    needed = -(-count // batches.stage.micro_batch_size)
    return list(torch.cat(list(islice(batches.micro_batches(start), needed)))[:count])


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_follows_the_place_in_the_stream(folder: Path, workers: int) -> None:
    config = DataConfig(train=str(folder), random_flip=True, cutmix=0.5, num_workers=workers)
    whole = stream(random_images(config), 48)
    assert len({image.numpy().tobytes() for image in whole}) > 38  # they are mirrored and mixed
    for micro, world_size in ((1, 2), (3, 1), (2, 2)):
        parts = [
            stream(random_images(config, micro=micro, rank=r, world_size=world_size), 24)
            for r in range(world_size)
        ]
        found = [image for images in zip(*parts, strict=True) for image in images]
        assert all(map(torch.equal, whole, found))
    assert all(
        map(torch.equal, whole[16:], stream(random_images(config), 32, start=2))
    )  # a resume behind two steps


def test_the_seed_reaches_order_and_sources(folder: Path) -> None:
    half = f"{folder}*0.5+emoji*0.5"
    for source, options in (
        (str(folder), {}),
        (half, {}),
        (str(folder), {"crop": "random"}),
        ("scenes", {}),
    ):
        config = DataConfig(train=source, random_flip=False, **options)
        first, same, second = (
            torch.stack(stream(random_images(config, seed=seed), 8)) for seed in (0, 0, 1)
        )
        assert torch.equal(first, same), source
        assert not torch.equal(first, second), source


def test_samples_and_previews_come_from_all_over_the_data(folder: Path) -> None:
    batches = random_images(DataConfig(train=str(folder), validation=str(folder)))
    for images in (batches.sample(12), batches.previews()):
        bright = images[:, 0, 0, -1] > 0.38
        assert len(images) == 12
        assert 3 <= bright.sum() <= 9
    assert torch.equal(
        batches.previews(),
        random_images(DataConfig(train=str(folder), validation=str(folder)), seed=5).previews(),
    )


def test_nothing_is_held_back_beside_a_validation_source(folder: Path) -> None:
    held_back = random_images(DataConfig(train=str(folder)))
    assert (len(held_back.training), len(held_back.validation)) == (38, 2)
    whole = random_images(DataConfig(train=str(folder), validation=str(folder)))
    assert (len(whole.training), len(whole.validation)) == (40, 40)
    scenes = random_images(DataConfig(train=str(folder), validation="scenes"))
    assert (len(scenes.training), scenes.validation.split) == (40, "validation")
    assert (
        random_images(DataConfig(train="scenes", validation=str(folder))).training.split == "train"
    )
