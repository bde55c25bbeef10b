from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizer_trainings import read
from torch import Tensor

from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.word_tokenizer import END, fit_word_tokenizer
from vqrae.tokenizer.config import DataConfig
from vqrae.tokenizer.data import StageImages, cutmix


def test_cutmix_puts_one_rectangle_of_another_image_into_an_image() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.zeros(3, 32, 32, dtype=torch.uint8)
    mixed = torch.stack([cutmix(own, own + 1, generator)[0] for _ in range(64)])
    foreign = mixed[:, ::4, ::4]  # which of both every cell of an 8 x 8 grid shows
    assert torch.equal(mixed, foreign.repeat_interleave(4, 1).repeat_interleave(4, 2))
    rows, columns = foreign.any(2), foreign.any(1)
    assert torch.equal(foreign.bool(), rows[:, :, None] & columns[:, None])
    for side in (rows, columns):
        assert 2 <= side.sum(1).min() <= side.sum(1).max() <= 6
        begins = side.int().diff(dim=1).clamp(min=0).sum(1) + side[:, 0]
        assert (begins == 1).all()  # in one piece
        assert side.any(0).all()  # anywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, dark and bright ones, each with its own grey and a white left half."""
    root = tmp_path_factory.mktemp("images")
    for i in range(40):
        pixels = np.full((8, 8, 3), i * 4 + 20 * (i >= 20), dtype=np.uint8)
        pixels[:, :4] = 255
        path = root / ("bright" if i >= 20 else "dark") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


STAGE = read("tiny", "stage1.global_batch_size=8", "stage1.micro_batch_size=8").stage1
ALONE: dict[str, Any] = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}


def open_stage(
    config: DataConfig, *, micro: int = 4, rank: int = 0, world_size: int = 1, seed: int = 0
) -> StageImages:
    batch = ("stage1.global_batch_size=8", f"stage1.micro_batch_size={micro}")
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": torch.device("cpu")}
    return StageImages(config, read("tiny", *batch).stage1, size=8, seed=seed, number=1, **place)


def stream(images: StageImages, number: int, start: int = 0) -> list[Tensor]:
    """The first images of a process."""
    batches = islice(images.micro_batches(start), -(-number // images.stage.micro_batch_size))
    return list(torch.cat([batch.images for batch in batches])[:number])


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_follows_the_place_in_the_stream(folder: Path, workers: int) -> None:
    config = DataConfig(train=str(folder), random_flip=True, cutmix=0.5, num_workers=workers)
    whole = stream(open_stage(config), 48)
    assert len({image.numpy().tobytes() for image in whole}) > 38  # they are mirrored and mixed
    for micro, world_size in ((1, 2), (3, 1), (2, 2)):
        place = {"micro": micro, "world_size": world_size}
        parts = [stream(open_stage(config, rank=r, **place), 24) for r in range(world_size)]
        for rank, part in enumerate(parts):
            assert all(map(torch.equal, whole[rank::world_size], part))
    # A resume after two steps.
    assert all(map(torch.equal, whole[16:], stream(open_stage(config), 32, start=2)))


def test_the_seed_reaches_order_and_sources(folder: Path) -> None:
    for source, crop in (
        (str(folder), "center"),
        (f"{folder}*0.5+emoji*0.5", "center"),
        (str(folder), "random"),
        ("scenes", "center"),
    ):
        config = DataConfig(train=source, random_flip=False, crop=crop)
        first, same, other = (stream(open_stage(config, seed=seed), 8) for seed in (0, 0, 1))
        assert all(map(torch.equal, first, same)), source
        assert not all(map(torch.equal, first, other)), source


def test_samples_and_previews_come_from_all_over_the_data(folder: Path) -> None:
    config = DataConfig(train=str(folder), validation=str(folder))
    stage = open_stage(config)
    for images in (stage.sample(12), stage.previews()):
        bright = images[:, 0, 0, -1] > 0.38
        assert len(images) == 12
        assert 3 <= bright.sum() <= 9
    assert torch.equal(stage.previews(), open_stage(config, seed=5).previews())


def test_a_validation_source_leaves_all_images_for_training(folder: Path) -> None:
    def sizes(train: str, validation: str | None) -> list[int]:
        images = open_stage(DataConfig(train=train, validation=validation))
        return [len(images.training), len(images.validation)]

    files = str(folder)
    assert sizes(files, None) == [38, 2]
    assert sizes(files, files) == [40, 40]
    scenes = sizes("scenes", None)  # which have no end, but a split that is for validation
    assert sizes(files, "scenes") == [40, scenes[1]]
    assert sizes("scenes", files) == [scenes[0], 40]


def test_captions_come_with_the_images_that_they_are_true_of(folder: Path) -> None:
    text_tokenizer = fit_word_tokenizer([], vocabulary_texts(("circle",)), size=99, end_with=END)
    source = f"scenes*0.5+{folder}*0.5"
    batches = []
    for cutmix_share in (0.0, 1.0):
        config = DataConfig(train=source, random_flip=False, cutmix=cutmix_share)
        images = StageImages(config, STAGE, text_tokenizer, size=8, seed=0, number=1, **ALONE)
        batches.append(next(images.micro_batches(0)))
    plain, mixed = batches
    lengths = plain.tokens["attention_mask"].sum(1)
    assert torch.equal(plain.captioned, lengths > 1)  # an empty caption is its end alone
    assert 0 < plain.captioned.sum() < len(plain.images) == 8
    assert not mixed.captioned.any()
    ends = plain.tokens["input_ids"].gather(1, lengths[:, None] - 1)
    assert (ends == text_tokenizer.eos_token_id).all()
    assert open_stage(config).text_tokenizer is None
