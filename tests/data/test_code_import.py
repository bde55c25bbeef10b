"""Codes of other programs: JSON lines and .npy files of every layout, and what does not fit is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from vqrae.data.code_import import import_codes, open_foreign
from vqrae.data.code_shards import CodeDataset

CODES = np.random.default_rng(0).integers(0, 100, (5, 2, 4))  # images, crops, codes
TOKENIZER = {"tokenizer_fingerprint": "a" * 64, "codebook_size": 100, "grid_size": 2}
CLASSES = ["a tench", "a goldfish", "a shark"]


def imported(source: Path, out: Path, **options: object) -> tuple[list[list[int]], list[str]]:
    """The code set as lists of codes and captions."""
    foreign = open_foreign(source, **options)  # type: ignore[arg-type]
    import_codes(foreign, out, source="elsewhere", shard_size=3, **TOKENIZER)  # type: ignore[arg-type]
    codes = CodeDataset(out, tokenizer_fingerprint="a" * 64)
    return [codes[i]["codes"].tolist() for i in range(len(codes))], [
        codes[i]["caption"] for i in range(len(codes))
    ]


def test_json_lines(tmp_path: Path) -> None:
    np.save(tmp_path / "four.npy", CODES[4, 0])
    lines = [
        {"tokens": CODES[0, 0].tolist(), "class_id": 2},
        {"codes": CODES[1, 0].tolist(), "caption": "a dog — ü"},
        {"vq_code": CODES[2, 0].tolist(), "text": "a cat"},
        {"codes": [CODES[3, 0].tolist()], "prompt": "a bird"},
        {"codes": "four.npy", "caption": ""},
    ]
    (tmp_path / "codes.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    codes, captions = imported(tmp_path / "codes.jsonl", tmp_path / "out", class_names=CLASSES)
    assert codes == CODES[:, 0].tolist()
    assert captions == ["a shark", "a dog — ü", "a cat", "a bird", ""]


def test_a_folder_of_images_with_captions(tmp_path: Path) -> None:
    for i in range(5):
        np.save(tmp_path / f"{i + 8}.npy", CODES[i, 0].astype(np.int16))
        (tmp_path / f"{i + 8}.txt").write_text(f"caption {i}\n")
    codes, captions = imported(tmp_path, tmp_path.parent / "out_captions")
    assert codes == CODES[:, 0].tolist()
    assert captions == [f"caption {i}" for i in range(5)]


def test_several_crops_with_classes(tmp_path: Path) -> None:
    """LlamaGen's layout: (1, crops, N), and labels in a folder beside."""
    for name in ("codes", "labels"):
        (tmp_path / name).mkdir()
    for i in range(5):
        np.save(tmp_path / "codes" / f"{i}.npy", CODES[i][None])
        np.save(tmp_path / "labels" / f"{i}.npy", np.array([i % 3]))
    codes, captions = imported(
        tmp_path / "codes", tmp_path / "out", labels=tmp_path / "labels", class_names=CLASSES
    )
    assert codes == CODES.reshape(10, 4).tolist()
    assert captions == [CLASSES[i % 3] for i in range(5) for _ in range(2)]
    assert CodeDataset(tmp_path / "out").manifest.crops_per_image == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"codes.jsonl, line 2: not valid JSON"),
        ('{"caption": "no codes"}', "line 2: expected a JSON object"),
        (
            '{"codes": [1, 2, 3], "caption": "x"}',
            r"line 2: holds int64 \(3,\), expected integers \(…, 4\)",
        ),
        ('{"codes": [1, 2, 3, 0.5], "caption": "x"}', "line 2: holds float64"),
        (
            '{"codes": [1, 2, 3, 100], "caption": "x"}',
            "line 2: holds codes from 1 to 100, expected 0 to 99",
        ),
        ('{"codes": [1, 2, 3, 4]}', "line 2: no caption"),
        ('{"codes": [1, 2, 3, 4], "class_id": 7}', "line 2: class 7, but 3 class names were given"),
        (
            '{"codes": [[1, 2, 3, 4], [1, 2, 3, 4]], "caption": "x"}',
            "line 2: holds another number of crops",
        ),
        ('{"codes": "gone.npy", "caption": "x"}', "gone.npy cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "codes.jsonl").write_text('{"codes": [1, 2, 3, 4], "caption": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        imported(tmp_path / "codes.jsonl", tmp_path / "out", class_names=CLASSES)


def test_sources_without_codes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no codes"):
        open_foreign(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_foreign(tmp_path / "gone")
    (tmp_path / "codes.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected FILE\.jsonl or a folder"):
        open_foreign(tmp_path / "codes.pt")
    np.save(tmp_path / "a.npy", CODES[0, 0])
    with pytest.raises(ValueError, match=r"a\.txt is not beside it"):
        imported(tmp_path, tmp_path / "out")
