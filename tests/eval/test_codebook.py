"""Codebook statistics against their definitions, and the command with its page."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqrae.common.images import save_image, tensor_to_image
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.eval.codebook import evaluate as codebook
from vqrae.eval.codebook.evaluate import (
    CodebookStatistics,
    measure_codebooks,
    nearest_others,
    summarize,
)
from vqrae.eval.codebook.page import code_cards
from vqrae.scripts.cli import main
from vqrae.tokenizer.codebook import initialize_codebook
from vqrae.tokenizer.modeling import VQRAEModel


def test_nearest_others_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    table, features = (torch.randn(n, 6, generator=generator) for n in (20, 30))
    expected = torch.cdist(features, table).topk(2, largest=False)
    codes, distances = nearest_others(features, table, expected.indices[:, 0])
    assert torch.equal(codes, expected.indices[:, 1])
    torch.testing.assert_close(distances, expected.values[:, 1])
    among = torch.cdist(table, table).fill_diagonal_(math.inf).min(1)
    others, spacing = CodebookStatistics(table, patch_size=2).neighbors
    assert torch.equal(others, among.indices)
    torch.testing.assert_close(spacing, among.values)


def test_summary() -> None:
    """Four codes on a line at 0, 10, 20, 40; four tokens at 0, 0, 12 and 14."""
    statistics = CodebookStatistics(torch.tensor([[0.0], [10.0], [20.0], [40.0]]), patch_size=2)
    tokens = torch.tensor([[0.0], [0.0], [12.0], [14.0]])
    statistics.update(torch.rand(1, 3, 4, 4), tokens, torch.tensor([0, 0, 1, 1]))
    values = statistics.summary()
    assert statistics.counts.tolist() == [2, 2, 0, 0]
    assert (values["used_codes"], values["dead_codes"], values["usage"]) == (2, 2, 0.5)
    assert values["perplexity"] == pytest.approx(2)
    assert values["entropy_bits"] == pytest.approx(1)
    assert values["rms_error"] == pytest.approx(math.sqrt((4 + 16) / 4))
    assert values["error_share"] == pytest.approx(5 / np.var([0, 0, 12, 14]))
    assert values["median_spacing"] == pytest.approx(10)
    assert values["top_share"] == pytest.approx(0.5)
    # Margins are 1, 1, 1 - 2/8 and 1 - 4/6.
    assert statistics.margins.nonzero().flatten().tolist() == [16, 37, 49]
    assert values["duplicates"] == 0


@pytest.mark.parametrize("quantizer", ["simvq", "mcq", "rvq", "fsq"])
def test_statistics_of_a_tokenizer(
    quantizer: str, make_tokenizer: Callable[..., VQRAEModel]
) -> None:
    number = 2 if quantizer in ("mcq", "rvq") else 1
    options: dict[str, Any] = {"quantizer": quantizer, "num_codebooks": number}
    if quantizer == "fsq":
        options |= {"codebook_dim": 2, "quantizer_options": {"levels": [8, 8]}}
    model = make_tokenizer(**options)
    scenes = SceneDataset("validation", 6)
    images = torch.stack([scenes.image(i) for i in range(6)]).float() / 255
    if quantizer != "fsq":
        initialize_codebook(model, images)
    whole, parts = (measure_codebooks(model, images.split(size)) for size in (6, 4))
    codes = model.encode(images).view(6, -1, number)
    for i, statistics in enumerate(whole):
        expected = torch.bincount(codes[..., i].flatten(), minlength=64)
        assert torch.equal(statistics.counts, expected)
        assert statistics.summary() == pytest.approx(parts[i].summary(), rel=1e-4)
    values = summarize(whole)
    for key, value in summarize(parts).items():
        assert key == "codebooks" or values[key] == pytest.approx(value, rel=1e-4)
    assert values["used_codes"] + values["dead_codes"] == 64 * number
    last = whole[-1]
    [card] = code_cards(model, whole, number - 1, codes[0, :1, -1])
    assert card["code"] == int(codes[0, 0, -1])
    assert card["count"] == int((codes[..., -1] == card["code"]).sum())
    assert np.array_equal(last.patches[card["code"]][0], scenes.pixels(0)[:8, :8])


def test_command(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes, out = SceneDataset("validation", 3), tmp_path / "out"
    for i in range(3):
        save_image(tensor_to_image(scenes.image(i).float() / 255), tmp_path / "images" / f"{i}.png")
    given = {"model": tokenizer_folder, "images": tmp_path / "images", "out": out}
    assert main(["codebook", *(f"--{key}={value}" for key, value in given.items())]) == 0
    values = json.loads((out / "codebook.json").read_text())
    assert sum(values["counts"]) == values["tokens"] == 3 * 64
    page = (out / "codebook.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained
    assert page.count('class="code"') == min(48, -(-values["used_codes"] // 3)) + sum(
        min(24, len(part)) for part in np.array_split(np.arange(values["used_codes"]), 3)[1:]
    )
    assert f"{values['dead_codes']} of 64 codes were not chosen" in page
    assert "dead codes; see" in capsys.readouterr().out


def test_page_of_several_codebooks(
    make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    model = make_tokenizer(quantizer="mcq", num_codebooks=2)
    images = torch.stack([SceneDataset("validation", 3).image(i) for i in range(3)]).float() / 255
    codebook.write_codebook_report(model, [images], tmp_path, source="scenes", tokenizer="a" * 64)
    values = json.loads((tmp_path / "codebook.json").read_text())
    assert [sum(counts) for counts in values["counts"]] == [3 * 64] * 2
    assert values["usage"] == pytest.approx(np.mean([v["usage"] for v in values["codebooks"]]))
    page = (tmp_path / "codebook.html").read_text()
    assert page.count('<h2 class="codebook">') == 2
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
