"""GQA from local parquet: lmms-eval's own task fetches the pictures from the hub whatever its data set is set to."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset

FOLDER_VARIABLE = "VQRAE_BENCHMARKS"
IMAGES = "testdev_balanced_images/*.parquet"


def join_local_images(questions: Dataset) -> Dataset:
    """The questions with their pictures, from `$VQRAE_BENCHMARKS/gqa/testdev_balanced_images/*.parquet` (id, image)."""
    files = sorted(str(path) for path in (Path(os.environ[FOLDER_VARIABLE]) / "gqa").glob(IMAGES))
    if not files:
        raise ValueError(
            f"{os.environ[FOLDER_VARIABLE]}/gqa holds no {IMAGES}: GQA keeps its pictures apart from its questions"
        )
    pictures = load_dataset("parquet", data_files=files, split="train")
    feature = pictures.features["image"]
    pictures = pictures.cast_column("image", Image(decode=False))  # decoded ones would be encoded again as JPEG
    rows = {identity: row for row, identity in enumerate(pictures["id"])}

    def with_image(question: dict[str, Any]) -> dict[str, Any]:
        return {"image": pictures[rows[question["imageId"]]]["image"]}

    return questions.map(with_image).cast_column("image", feature)
