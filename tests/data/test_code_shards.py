"""Code shards: round trip, resuming, and every kind of damage named."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vqrae.common.files import read_json, write_json
from vqrae.data.code_shards import CodeDataset, CodeManifest, CodeWriter, open_shard
from vqrae.data.sources import vocabulary
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
SEVERAL = replace(MANIFEST, num_codebooks=3)
CODES_OF_SEVERAL = np.random.default_rng(0).integers(0, 60_000, (7, 4, 3))
CAPTIONS = [[f"image {i}", f"Bild {i} — ü\nzweite Zeile"] for i in range(7)]


def write(folder: Path, shards: range = range(3), manifest: CodeManifest = MANIFEST) -> CodeWriter:
    writer = CodeWriter(folder, manifest)
    codes = CODES if manifest.num_codebooks == 1 else CODES_OF_SEVERAL
    for shard in shards:
        rows = manifest.images_of(shard)
        writer.write(shard, codes[rows], [CAPTIONS[i] for i in rows])
    return writer


@pytest.mark.parametrize(("manifest", "codes"), [(MANIFEST, CODES), (SEVERAL, CODES_OF_SEVERAL)])
def test_round_trip(manifest: CodeManifest, codes: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, manifest=manifest)
    dataset = CodeDataset(tmp_path, tokenizer_fingerprint="a" * 64)
    assert len(dataset) == 7
    for i in range(7):
        assert dataset[i]["codes"].dtype == torch.int64
        assert dataset[i]["codes"].tolist() == codes[i].tolist()
        assert dataset.texts(i) == CAPTIONS[i]
        heard = Counter(dataset[Draw(i, epoch)]["caption"] for epoch in range(6))
        assert heard == dict.fromkeys(CAPTIONS[i], 3)
    starts = {CAPTIONS[i].index(dataset[i]["caption"]) for i in range(7)}
    assert len(starts) == 2, "not all images start with the first caption"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"index-{i:05d}.npy" for i in range(3)),
        "manifest.json",
        *(f"shard-{i:05d}.{kind}" for i in range(3) for kind in ("jsonl", "npy")),
    ]
    with pytest.raises(IndexError, match="7 images"):
        dataset[7]
    with pytest.raises(FileNotFoundError, match="extract_codes"):
        CodeDataset(tmp_path / "elsewhere")


def test_a_set_from_before_several_codebooks_is_the_same(tmp_path: Path) -> None:
    write(tmp_path)
    fingerprint = CodeDataset.fingerprint(tmp_path)
    values = read_json(tmp_path / "manifest.json")
    assert values.pop("num_codebooks") == 1
    write_json(tmp_path / "manifest.json", values)
    assert CodeDataset.fingerprint(tmp_path) == fingerprint
    assert CodeWriter(tmp_path, MANIFEST).is_complete(2)
    with pytest.raises(ValueError, match="num_codebooks 1 -> 3"):
        CodeWriter(tmp_path, SEVERAL)


def test_codes_of_scenes_know_the_words_of_scenes(tmp_path: Path) -> None:
    write(tmp_path, manifest=replace(MANIFEST, source="scenes:emoji (train, seed 0)"))
    assert vocabulary(str(tmp_path)) == vocabulary("scenes") != []


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
    (tmp_path / "index-00001.npy").unlink()  # as after a crash between the files of a shard
    assert [writer.is_complete(shard) for shard in range(3)] == [True, False, True]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = CodeWriter(tmp_path, MANIFEST)
    for codes, captions, message in (
        (np.full((3, 4), 60_000), CAPTIONS[:3], "expected 0 … 59999"),
        (CODES[:2], CAPTIONS[:2], r"expected \(3, 4\)"),
        (CODES_OF_SEVERAL[:3], CAPTIONS[:3], r"expected \(3, 4\)"),
        (CODES[:3], [["a"], [], ["b"]], "image 1 has no caption"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(0, codes, captions)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00001.jsonl", "index-00001.npy"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    path, shards = tmp_path / name, range(3)
    sound = path.read_bytes()
    for size in (0, 20, -1):
        path.write_bytes(sound[:size])
        with pytest.raises(ValueError, match=f"{name} is damaged.*extract the codes again"):
            CodeDataset(tmp_path)
    path.write_bytes(sound)
    whole = [open_shard(tmp_path, shard, MANIFEST, verify=True).codes for shard in shards]
    assert np.array_equal(np.concatenate(whole), CODES)
    if name.startswith("shard"):
        path.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
        assert len(CodeDataset(tmp_path)) == 7, "opening looks at sizes only"
        with pytest.raises(ValueError, match=f"{name} is damaged .it has changed"):
            open_shard(tmp_path, 1, MANIFEST, verify=True)


def test_codes_out_of_range_are_never_trained_on(tmp_path: Path) -> None:
    write(tmp_path)
    np.save(tmp_path / "shard-00000.npy", np.full((3, 4), 60_001, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"image 2 holds code 60001.*vqrae check-data"):
        CodeDataset(tmp_path)[2]


def test_1024_codes_take_2_kib(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, grid_size=32, num_images=100, shard_size=100)
    CodeWriter(tmp_path, manifest).write(0, np.zeros((100, 1024), dtype=np.int64), [["a"]] * 100)
    assert (tmp_path / "shard-00000.npy").stat().st_size == 100 * 2048 + 128  # numpy's header


def test_another_tokenizer_and_another_set_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"a{16}.*b{16}"):
        CodeDataset(tmp_path, tokenizer_fingerprint="b" * 64)
    with pytest.raises(ValueError, match=r"b{16}"):
        CodeWriter(tmp_path, replace(MANIFEST, tokenizer_fingerprint="b" * 64))
    with pytest.raises(ValueError, match="num_images 7 -> 8"):
        CodeWriter(tmp_path, replace(MANIFEST, num_images=8))
    with pytest.raises(ValueError, match="65537"):
        replace(MANIFEST, codebook_size=65_537)
