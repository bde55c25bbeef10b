"""Training, extraction and sampling where flash-attention is chosen, whose kernels refuse fp32."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vqrae.generation import extract_codes, train
from vqrae.generation.generator import Generator


def test_a_run_on_images_and_its_samples(
    flash_attention: str, train_arguments: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    lines = []
    for color in ("red", "blue", "green", "white"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
        lines.append(json.dumps({"image": f"{color}.png", "caption": f"all {color}"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    options = [
        f"model.attention={flash_attention}",
        "optimization.max_steps=1",
        f"output_dir={tmp_path}",
    ]
    train.main([*train_arguments, f"data={tmp_path / 'pairs.jsonl'}", *options])
    assert Generator.from_pretrained(tmp_path).images(["a red circle"], seeds=[0]).shape == (
        1,
        3,
        32,
        32,
    )
    source = [
        f"tokenizer={tokenizer_path}",
        f"source={tmp_path / 'pairs.jsonl'}",
        f"output_dir={tmp_path / 'codes'}",
    ]
    extract_codes.main(["tiny", *source])
    assert (tmp_path / "codes" / "manifest.json").is_file()


def test_fp32_training_is_refused(
    flash_attention: str, train_arguments: list[str], tmp_path: Path
) -> None:
    options = [
        f"model.attention={flash_attention}",
        "optimization.bf16=false",
        f"output_dir={tmp_path}",
    ]
    with pytest.raises(ValueError, match="set bf16=true"):
        train.main([*train_arguments, *options])
