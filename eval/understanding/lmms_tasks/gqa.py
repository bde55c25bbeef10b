"""GQA from local parquet: lmms-eval's own task fetches the images from the hub whatever its data set is set to."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset

FOLDER_VARIABLE = "VQRAE_BENCHMARKS"
IMAGES = "testdev_balanced_images/*.parquet"


def join_local_images(questions: Dataset) -> Dataset:
    """The questions with their images, from `$VQRAE_BENCHMARKS/gqa/testdev_balanced_images/*.parquet` (id, image)."""
    files = sorted(str(path) for path in (Path(os.environ[FOLDER_VARIABLE]) / "gqa").glob(IMAGES))
    if not files:
        raise ValueError(
            f"{os.environ[FOLDER_VARIABLE]}/gqa holds no {IMAGES}: GQA keeps its images apart from its questions"
        )
    images = load_dataset("parquet", data_files=files, split="train")
    feature = images.features["image"]
    images = images.cast_column(
        "image", Image(decode=False)
    )  # decoded ones would be encoded again as JPEG
    rows = {identity: row for row, identity in enumerate(images["id"])}

    def with_image(question: dict[str, Any]) -> dict[str, Any]:
        return {"image": images[rows[question["imageId"]]]["image"]}

    return questions.map(with_image).cast_column("image", feature)
