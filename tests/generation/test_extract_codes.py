"""Extraction: the tokenizer's own codes, resumable, shared among processes."""

import json
from pathlib import Path

import pytest
import torch

from vqrae.common.files import weights_fingerprint
from vqrae.data.code_shards import CodeDataset
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.generation import extract_codes
from vqrae.generation.extract_codes import ImagesToEncode
from vqrae.tokenizer.modeling import VQRAEModel


def arguments(tokenizer: Path, output: Path, *more: str) -> list[str]:
    return [
        "tiny",
        f"tokenizer={tokenizer}",
        "size=20",
        "shard_size=8",
        f"output_dir={output}",
        *more,
    ]


def test_codes_are_those_of_the_tokenizer(tokenizer_path: Path, codes_path: Path) -> None:
    codes = CodeDataset(codes_path, tokenizer_fingerprint=weights_fingerprint(tokenizer_path))
    images = torch.stack([SceneDataset("train", 20, image_size=32).image(i) for i in range(20)])
    with torch.inference_mode():
        expected = VQRAEModel.from_pretrained(tokenizer_path).eval().encode(images.float() / 255)
    assert torch.equal(torch.stack([codes[i]["codes"] for i in range(20)]), expected)
    assert all(
        len(codes.texts(i)) == 3 and codes.texts(i)[0].startswith("a photo of") for i in range(20)
    )


def test_processes_share_the_shards(
    tokenizer_path: Path,
    codes_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    command = arguments(tokenizer_path, tmp_path, "captions_per_image=3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shards in (
        ("1", ["shard-00001.npy"]),
        ("0", [f"shard-0000{i}.npy" for i in range(3)]),
    ):
        monkeypatch.setenv("RANK", rank)
        extract_codes.main(command)
        assert sorted(path.name for path in tmp_path.glob("shard-*.npy")) == shards
    for path in sorted(codes_path.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert "finished" in capsys.readouterr().out


def test_relaunch_writes_only_what_is_missing(tokenizer_path: Path, tmp_path: Path) -> None:
    extract_codes.main(arguments(tokenizer_path, tmp_path))
    kept, lost = tmp_path / "shard-00000.npy", tmp_path / "shard-00001.npy"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    extract_codes.main(arguments(tokenizer_path, tmp_path))
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content


def test_other_settings_do_not_mix(
    tokenizer_path: Path, other_tokenizer_path: Path, tmp_path: Path
) -> None:
    extract_codes.main(arguments(tokenizer_path, tmp_path))
    with pytest.raises(ValueError, match="shard_size 8 -> 10"):
        extract_codes.main(arguments(tokenizer_path, tmp_path, "shard_size=10"))
    with pytest.raises(ValueError, match="was made with tokenizer"):
        extract_codes.main(arguments(other_tokenizer_path, tmp_path))


def test_files_carry_one_caption(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (40, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": f"number {i}"}) for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = extract_codes.open_pairs(str(tmp_path / "pairs.jsonl"), image_size=32, split="all")
    sample = ImagesToEncode(pairs, captions_per_image=2)[
        2
    ]  # of scenes; as the bare command with `data=FILE` asks
    assert sample["captions"] == ["number 2"]
    assert sample["image"].shape == (3, 32, 32)


def test_a_tokenizer_with_a_broken_weight_is_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    model = VQRAEModel.from_pretrained(tokenizer_path)
    torch.nn.init.constant_(model.encoder.encoder.layers[0].mlp.fc1.bias, torch.nan)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"mlp.fc1.bias holds values that are not finite"):
        extract_codes.main(arguments(tmp_path / "model", tmp_path / "codes"))
