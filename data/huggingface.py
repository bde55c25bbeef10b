"""Hugging Face data sets: a hub id, FILE.parquet, a folder (parquet, images or `save_to_disk`).

    hf:NAME,config=…,split=…,image=…,caption=…

Only the name is needed where one column holds images and one captions.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.config import did_you_mean
from vqrae.common.files import read_bytes, with_retries
from vqrae.data.samples import Encoded, EncodedImages, checksum, name_hash
from vqrae.data.stream import Draw

PREFIX = "hf:"
OPTIONS = ("config", "split", "image", "caption")
CAPTION_COLUMNS = ["caption", "captions", "text", "txt", "prompt"]
CAPTION_COLUMNS += ["sentence", "sentences", "description"]


def parse_name(source: str) -> tuple[str, dict[str, str]]:
    """Name and options of `hf:NAME,key=value,…`; ValueError for an unknown option, or no name."""
    name, *pairs = source.removeprefix(PREFIX).split(",")
    if not name:
        raise ValueError(
            f"{source}: expected {PREFIX}NAME with a data set, a folder or a .parquet file"
        )
    options = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in OPTIONS or not value:
            raise ValueError(
                f"{source}: cannot use {pair!r}, expected one of {'=…, '.join(OPTIONS)}=…. "
                f"{did_you_mean(key, OPTIONS)}"
            )
        options[key] = value
    return name, options


def open_table(source: str) -> Any:
    """The `datasets.Dataset` of a source name.

    Raises ValueError when its files are damaged, or its splits are several and none is named;
    errors of `datasets` when there is none, or the hub cannot be reached.
    """
    import datasets

    name, options = parse_name(source)
    folder = Path(name)
    try:
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        elif name.endswith(".parquet"):
            loaded = datasets.load_dataset("parquet", data_files=name)
        else:
            loaded = datasets.load_dataset(name, options.get("config"))
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    default = "train" if "train" in loaded or len(loaded) > 1 else next(iter(loaded))
    split = options.get("split", default)
    if split not in loaded:
        raise ValueError(
            f"{source} has the splits {', '.join(loaded)}: "
            f"name one, as in {PREFIX}{name},split={next(iter(loaded))}"
        )
    return loaded[split]


def _holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    is_binary = getattr(feature, "dtype", "") in ("binary", "large_binary")
    return is_binary or isinstance(feature, datasets.Image)


def find_columns(source: str, features: Any) -> tuple[str, str | None]:
    """The image column and the caption column (None when there is none), as named or as found."""
    options = parse_name(source)[1]
    image, caption = options.get("image"), options.get("caption")
    for column in (image, caption):
        if column is not None and column not in features:
            hint = did_you_mean(column, list(features))
            raise ValueError(f"{source}: no column {column!r}. {hint}")
    images = [image] if image else [name for name in features if _holds_images(features[name])]
    if len(images) != 1:
        found = f"no column of {', '.join(features)} holds images"
        if images:
            found = f"columns {', '.join(images)} hold images"
        raise ValueError(f"{source}: {found}; name the one to use with ,image=COLUMN")
    return images[0], caption or next((name for name in CAPTION_COLUMNS if name in features), None)


def without_decoding(table: Any, column: str) -> Any:
    """The table with the images of `column` as they are stored."""
    import datasets

    if isinstance(table.features[column], datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    return table


def stored_bytes(value: Any, name: str) -> bytes:
    """The encoded image in a cell, bytes or {"bytes", "path"}; ValueError when there is none."""
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes") or (read_bytes(path) if path else None)
    if not isinstance(value, bytes) or not value:
        raise ValueError(f"{name}: holds no image")
    return value


class HuggingFaceDataset(EncodedImages):
    """Rows of a data set, in their memory-mapped Arrow files; the split hashes row numbers.

    Where a row has a list of captions, each epoch takes the next.
    """

    def __init__(self, source: str, **options: Any) -> None:
        super().__init__(source, **options)
        table = open_table(source)
        self.image_column, self.caption_column = find_columns(source, table.features)
        if self.captions and self.caption_column is None and not self.optional:
            raise ValueError(
                f"{source} has no caption column among {', '.join(table.features)}: "
                "name one with ,caption=COLUMN"
            )
        table = without_decoding(table, self.image_column)
        # Any other column would be read with every row.
        columns = [name for name in (self.image_column, self.caption_column) if name]
        self.table = table.select_columns(columns)
        hashes = [name_hash(str(row)) for row in range(len(table))]
        self.rows = self.chosen(hashes).astype(np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, draw: Draw) -> Encoded:
        row = int(self.rows[draw])
        name = f"{self.source}, row {row}"
        record = with_retries(lambda: self.table[row], name)
        data = stored_bytes(record[self.image_column], name)
        caption = record[self.caption_column] if self.caption_column else None
        if isinstance(caption, list):
            caption = caption[draw.epoch % len(caption)] if caption else None
        return Encoded(name, data, caption if isinstance(caption, str) else None)

    @staticmethod
    def fingerprint(source: str) -> str:
        """Rows of a data set and a checksum of a hundred of them, evenly spread."""
        table = open_table(source)
        for column in table.features:
            table = without_decoding(table, column)
        rows = np.unique(np.linspace(0, len(table) - 1, 100).astype(int)).tolist()
        content = b"".join(repr(table[row]).encode() for row in rows)
        return f"{len(table)} rows, crc32 {checksum(content)}"
