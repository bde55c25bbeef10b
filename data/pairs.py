"""Pictures with captions, listed in a JSON-lines file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.pictures import open_picture
from vqrae.data.tolerant import FileSplit, TolerantDataset, fit_picture, missing_files, name_hash, split_indices, summary


def read_jsonl(path: str | Path) -> list[tuple[str, str]]:
    """(picture, caption) of each line {"image": path, "caption": text}; pictures lie relative to the file's folder.

    Raises:
        FileNotFoundError: when the file, or a picture that it names, does not exist; the first few are listed.
        ValueError: listing the first lines that are not of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record["image"], str) or not isinstance(record["caption"], str):
                    raise TypeError("image and caption must be text")
                pairs.append((record["image"], record["caption"].strip()))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                problems.append(f"line {number}: {type(error).__name__}: {error}")
    if problems or not pairs:
        form = '{"image": "picture.jpg", "caption": "text"}'
        raise ValueError(f"{path}: {len(problems)} lines cannot be used; each must be {form}{summary(problems)}")
    missing = [str(file) for file in missing_files(path.parent / image for image, _ in pairs)]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(pairs)} pictures do not exist (paths are relative to the file's folder)"
            f"{summary(missing)}"
        )
    return pairs


class CaptionedImages(TolerantDataset):
    """Lines of a JSON-lines file -> {"image": uint8 (3, H, W), "caption": str}; see `read_jsonl` for the format."""

    def __init__(self, path: str | Path, *, image_size: int, size: int | None = None, split: FileSplit = "train") -> None:
        super().__init__(str(path))
        self.image_size = image_size
        found, self.folder = read_jsonl(path), Path(path).parent
        hashes = np.array([name_hash(image) for image, _ in found])
        self.pairs = [found[i] for i in split_indices(hashes, split, self.source)][:size]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> dict[str, Any]:
        image, caption = self.pairs[index]
        return {"image": fit_picture(open_picture(self.folder / image), self.image_size), "caption": caption}
