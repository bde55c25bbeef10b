import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vqrae.common.files import read_json
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.scene import COLOR_VALUES
from vqrae.quickstart import locality
from vqrae.quickstart.locality import (
    conditional_entropy,
    object_knowledge,
    patches_of,
    plain_patches,
)


def found_in(scenes: SceneDataset, index: int) -> list[tuple[int, int, int]]:
    return plain_patches(scenes.scene(index), patches_of(scenes, index, 8))


class Codes:
    """A tokenizer of 8 x 8 codes that tell each patch's colour, or its object too."""

    config = SimpleNamespace(grid_size=8, image_size=64, num_codebooks=1)
    device = torch.device("cpu")

    def __init__(self, scenes: SceneDataset, *, know_names: bool) -> None:
        self.scenes, self.know_names, self.next = scenes, know_names, 0

    def encode(self, images: Tensor) -> Tensor:
        corners = images[:, :, 3::8, 3::8].flatten(2)
        codes = (corners * torch.tensor([100, 10, 1])[:, None]).sum(1).mul(1000).long()
        for row in codes if self.know_names else ():
            for patch, name, _ in found_in(self.scenes, self.next):
                row[patch] += (name + 1) * 1_000_000
            self.next += 1
        return codes


def test_conditional_entropy() -> None:
    coin = [(side, given) for side in "ab" for given in range(5)]
    assert conditional_entropy(coin) == pytest.approx(math.log(2))
    assert conditional_entropy([(given % 2, given) for given in range(10)]) == 0
    # b = 0: two of three are the same; b = 1: certain.
    assert conditional_entropy([("x", 0), ("x", 0), ("y", 0), ("x", 1)]) == pytest.approx(
        0.75 * (2 / 3 * math.log(3 / 2) + math.log(3) / 3)
    )


def test_plain_patches_show_nothing_but_their_paint() -> None:
    scenes = SceneDataset(size=100)
    found = 0
    for index in range(100):
        pixels, objects = (
            scenes.pixels(index) / 255,
            {(o.name, o.color) for o in scenes.scene(index).objects},
        )
        for patch, name, color in found_in(scenes, index):
            y, x = divmod(patch, 8)
            shown = pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            assert np.abs(shown - COLOR_VALUES[color]).max() < 0.01
            assert (name, color) in objects
            found += 1
    assert found > 50


def test_what_codes_know_of_the_thing_around_their_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locality, "REPEATED", 5)
    scenes = SceneDataset(size=150)
    nothing: Any = Codes(scenes, know_names=False)
    everything: Any = Codes(scenes, know_names=True)
    blind, seeing = object_knowledge(nothing, scenes), object_knowledge(everything, scenes)
    assert blind["known_share"] == pytest.approx(0, abs=1e-9)
    assert blind["codes_per_color"] == 1
    assert seeing["known_share"] == 1
    assert blind["code_given_patch"] == 0 < seeing["code_given_patch"]
    assert blind["name_given_color"] == seeing["name_given_color"] > 0.5
    with pytest.raises(ValueError, match="no patch of one colour"):
        object_knowledge(nothing, SceneDataset(size=0))


def test_the_command(
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(locality, "PROMPTS", 4)
    locality.main([f"model={tokenizer_folder}", f"output={tmp_path / 'out.json'}", "num_images=40"])
    scores = read_json(tmp_path / "out.json")
    assert 0 <= scores["known_share"] <= 1
    assert set(scores["reconstruction"]) == {"seen", "held_out"}
    assert "codes of one-coloured patches know" in capsys.readouterr().out
