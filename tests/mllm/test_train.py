"""Training."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqrae.common.run import read_metrics
from vqrae.mllm import train


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def run(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train.main([*arguments, f"output_dir={folder}"])
    return folder


def test_resume_equals_uninterrupted(run: Path, arguments: list[str], tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    train.main([*arguments, f"output_dir={tmp_path}"])
    expected = weights(run)
    found = weights(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = ("loss", "image_loss", "text_loss")
    rows = [[row[name] for name in names] for row in read_metrics(run)]
    assert [[row[name] for name in names] for row in read_metrics(tmp_path)] == rows[2:]
