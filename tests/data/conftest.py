"""Small images and the same images as every kind of source."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image

COUNT = 42


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """Encoded image of one colour whose first channel is the number, or of noise that it seeds."""

    def encode(number: int, size: tuple[int, int] = (4, 3), *, noise: bool = False) -> bytes:
        stream, rng = io.BytesIO(), np.random.default_rng(number)
        image = Image.new("RGB", size, (number, 7, 255 - number))
        if noise:
            image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        image.save(stream, "PNG")
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_source(png: Callable[..., bytes]) -> Callable[..., str]:
    """Write `COUNT` numbered images as a source of a kind; those in `broken` are cut short."""

    def make(kind: str, folder: Path, broken: tuple[int, ...] = ()) -> str:
        folder.mkdir(exist_ok=True)
        files = [png(i)[: 40 if i in broken else None] for i in range(COUNT)]
        texts = [f"number {i}" for i in range(COUNT)]
        if kind == "mixture":
            tars, table = (make(part, folder / part, broken) for part in ("tar", "hf"))
            return f"{tars}*0.75+{table}*0.25"
        if kind == "tar":
            pattern = str(folder / "part-%d.tar")
            with webdataset.ShardWriter(pattern, maxcount=16, verbose=0) as writer:
                for i, data in enumerate(files):
                    writer.write({"__key__": f"{i:03d}", "png": data, "txt": texts[i]})
            return str(folder / "part-{0..2}.tar")
        if kind == "hf":
            features = datasets.Features(
                {"image": datasets.Image(), "text": datasets.Value("string")}
            )
            table = {"image": [{"bytes": data, "path": None} for data in files], "text": texts}
            datasets.Dataset.from_dict(table, features=features).save_to_disk(folder / "hf")
            return f"hf:{folder / 'hf'}"
        names = [f"{'sub/' * (i % 2)}{i:03d}.png" for i in range(COUNT)]
        (folder / "sub").mkdir()
        for name, data in zip(names, files, strict=True):
            (folder / name).write_bytes(data)
        if kind == "folder":
            return str(folder)
        lines = [{"image": names[i], "caption": f" {texts[i]} "} for i in range(COUNT)]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return str(folder / "pairs.jsonl")

    return make
