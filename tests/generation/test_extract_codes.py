"""Extraction: the tokenizer's own codes, resumable, shared among processes."""

from pathlib import Path

import pytest
import torch

from vqrae.common.files import weights_fingerprint
from vqrae.data.code_shards import CodeDataset
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.sources import open_pairs
from vqrae.generation import extract_codes
from vqrae.tokenizer.modeling import VQRAEModel


def test_codes_are_those_of_the_tokenizer(tokenizer_path: Path, codes_path: Path) -> None:
    codes = CodeDataset(codes_path, tokenizer_fingerprint=weights_fingerprint(tokenizer_path))
    images = torch.stack([SceneDataset("train", 20, image_size=32).image(i) for i in range(20)])
    with torch.inference_mode():
        expected = VQRAEModel.from_pretrained(tokenizer_path).eval().encode(images.float() / 255)
    assert torch.equal(torch.stack([codes[i]["codes"] for i in range(20)]), expected)
    for i in range(20):
        assert len(codes.texts(i)) == 3
        assert codes.texts(i)[0].startswith("a photo of")


def test_processes_share_the_shards(
    extraction: list[str],
    codes_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("1", 1), ("0", 3)):
        monkeypatch.setenv("RANK", rank)
        extract_codes.main([*extraction, "captions_per_image=3", f"output_dir={tmp_path}"])
        assert len(list(tmp_path.glob("shard-*.npy"))) == count
    for path in sorted(codes_path.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert "finished" in capsys.readouterr().out


def test_relaunch_writes_only_what_is_missing_and_mixes_nothing(
    extraction: list[str], other_tokenizer_path: Path, tmp_path: Path
) -> None:
    command = [*extraction, f"output_dir={tmp_path}"]
    extract_codes.main(command)
    kept, lost = tmp_path / "shard-00000.npy", tmp_path / "shard-00001.npy"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    extract_codes.main(command)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content
    with pytest.raises(ValueError, match="shard_size 8 -> 10"):
        extract_codes.main([*command, "shard_size=10"])
    with pytest.raises(ValueError, match="was made with tokenizer"):
        extract_codes.main([*command, f"tokenizer={other_tokenizer_path}"])


def test_several_crops_are_entries_of_their_own(
    pairs: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    command = ["tiny", f"tokenizer={tokenizer_path}", f"source={pairs}", f"output_dir={tmp_path}"]
    extract_codes.main([*command, "crop=random", "crops_per_image=2", "captions_per_image=2"])
    codes = CodeDataset(tmp_path)
    assert (codes.manifest.crop, codes.manifest.crops_per_image, len(codes)) == ("random", 2, 22)
    # Several captions are of scenes: a file has one for each image.
    assert [codes.texts(i) for i in range(11)] == [codes.texts(i) for i in range(11, 22)]
    assert len(codes.texts(0)) == 1
    assert sum(torch.equal(codes[i]["codes"], codes[i + 11]["codes"]) for i in range(11)) < 6
    with pytest.raises(ValueError, match="set crop=random, zoom or ten"):
        extract_codes.main(["tiny", "crops_per_image=2"])
    with pytest.raises(ValueError, match="scenes are square"):
        extract_codes.ImagesToEncode(open_pairs("scenes", image_size=32, size=4), 1, 2)


def test_a_tokenizer_with_a_broken_weight_is_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    model = VQRAEModel.from_pretrained(tokenizer_path)
    torch.nn.init.constant_(model.encoder.encoder.layers[0].mlp.fc1.bias, torch.nan)
    model.save_pretrained(tmp_path / "model")
    command = ["tiny", f"tokenizer={tmp_path / 'model'}", f"output_dir={tmp_path / 'codes'}"]
    with pytest.raises(ValueError, match=r"mlp.fc1.bias holds values that are not finite"):
        extract_codes.main(command)
