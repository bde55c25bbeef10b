"""Code shards: round trip, resuming, and every kind of damage named."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vqrae.data.code_shards import CodeDataset, CodeManifest, CodeWriter, verify_shard
from vqrae.data.stream import Draw

MANIFEST = CodeManifest(
    tokenizer_fingerprint="a" * 64,
    codebook_size=60_000,
    grid_size=2,
    source="test",
    num_images=7,
    shard_size=3,
)
CODES = np.random.default_rng(0).integers(0, 60_000, (7, 4))
CAPTIONS = [[f"image {i}", f"Bild {i} — ü\nzweite Zeile"] for i in range(7)]


def write(folder: Path, shards: range = range(3)) -> CodeWriter:
    writer = CodeWriter(folder, MANIFEST)
    for shard in shards:
        rows = MANIFEST.images_of(shard)
        writer.write(shard, CODES[rows], [CAPTIONS[i] for i in rows])
    return writer


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = CodeDataset(tmp_path, tokenizer_fingerprint="a" * 64)
    assert len(dataset) == 7
    for i in range(7):
        assert dataset[i]["codes"].dtype == torch.int64
        assert dataset[i]["codes"].tolist() == CODES[i].tolist()
        assert dataset.texts(i) == CAPTIONS[i]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"index-{i:05d}.npy" for i in range(3)),
        "manifest.json",
        *(f"shard-{i:05d}.{kind}" for i in range(3) for kind in ("jsonl", "npy")),
    ]
    with pytest.raises(IndexError, match="7 images"):
        dataset[7]


def test_draws_take_every_caption_equally_often(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = CodeDataset(tmp_path)
    for i in range(7):
        assert Counter(dataset[Draw(i, epoch)]["caption"] for epoch in range(6)) == dict.fromkeys(
            CAPTIONS[i], 3
        )
    assert (
        len({CAPTIONS[i].index(dataset[i]["caption"]) for i in range(7)}) == 2
    )  # not all images start with the first


def test_resume_keeps_complete_shards_and_rewrites_damaged_ones(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    with pytest.raises(FileNotFoundError, match="lacks shard 2 of 3"):
        CodeDataset(tmp_path)
    path = tmp_path / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    writer = CodeWriter(tmp_path, MANIFEST)
    assert [writer.is_complete(shard) for shard in range(3)] == [True, False, False]
    write(tmp_path, range(1, 3))
    assert len(CodeDataset(tmp_path)) == 7


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = CodeWriter(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match="expected 0 … 59999"):
        writer.write(0, np.full((3, 4), 60_000), CAPTIONS[:3])
    with pytest.raises(ValueError, match=r"expected \(3, 4\)"):
        writer.write(0, CODES[:2], CAPTIONS[:2])
    with pytest.raises(ValueError, match="image 1 has no caption"):
        writer.write(0, CODES[:3], [["a"], [], ["b"]])
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00001.jsonl", "index-00001.npy"])
@pytest.mark.parametrize("size", [0, 20, -1])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, size: int) -> None:
    write(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{name} is damaged.*extract the codes again"):
        CodeDataset(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00001.jsonl"])
def test_verification_finds_a_changed_byte(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    for shard in range(3):
        assert np.array_equal(
            verify_shard(tmp_path, shard, MANIFEST).codes, CODES[MANIFEST.images_of(shard)]
        )
    data = bytearray((tmp_path / name).read_bytes())
    data[-5] ^= 1
    (tmp_path / name).write_bytes(data)
    assert len(CodeDataset(tmp_path)) == 7  # opening looks at sizes: sets of terabytes open at once
    with pytest.raises(ValueError, match=f"{name} is damaged .it has changed"):
        verify_shard(tmp_path, 1, MANIFEST)


def test_a_shard_without_its_index_is_written_again(tmp_path: Path) -> None:
    """As after a crash between the files of a shard."""
    write(tmp_path)
    (tmp_path / "index-00001.npy").unlink()
    assert [CodeWriter(tmp_path, MANIFEST).is_complete(shard) for shard in range(3)] == [
        True,
        False,
        True,
    ]
    with pytest.raises(FileNotFoundError, match="lacks shard 1 of 3"):
        CodeDataset(tmp_path)


def test_codes_out_of_range_are_never_trained_on(tmp_path: Path) -> None:
    write(tmp_path)
    np.save(tmp_path / "shard-00000.npy", np.full((3, 4), 60_001, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"image 2 holds code 60001.*vqrae check-data"):
        CodeDataset(tmp_path)[2]


def test_1024_codes_take_2_kib(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, grid_size=32, num_images=100, shard_size=100)
    CodeWriter(tmp_path, manifest).write(0, np.zeros((100, 1024), dtype=np.int64), [["a"]] * 100)
    assert (tmp_path / "shard-00000.npy").stat().st_size == 100 * 2048 + 128  # numpy's header


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"a{16}.*b{16}"):
        CodeDataset(tmp_path, tokenizer_fingerprint="b" * 64)
    with pytest.raises(ValueError, match=r"b{16}"):
        CodeWriter(tmp_path, replace(MANIFEST, tokenizer_fingerprint="b" * 64))


def test_another_set_is_not_mixed_in(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="num_images 7 -> 8"):
        CodeWriter(tmp_path, replace(MANIFEST, num_images=8))


def test_a_large_codebook_does_not_fit() -> None:
    with pytest.raises(ValueError, match="65537"):
        replace(MANIFEST, codebook_size=65_537)
    assert replace(MANIFEST, codebook_size=65_536).num_shards == 3


def test_no_code_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="extract_codes"):
        CodeDataset(tmp_path)
