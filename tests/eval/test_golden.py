"""Numbers of the benchmarks' own code: each file in `golden` was made from that code by the script of its name."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mask2FormerForUniversalSegmentation

from vqrae.eval.geneval.mask2former import MEAN as GREY
from vqrae.eval.geneval.mask2former import MMDET_PADDING, STD, instances, prepare, swin_small_config
from vqrae.eval.geneval.mmdet_keys import from_mmdet
from vqrae.eval.geneval.prompts import OBJECT_NAMES

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Any], Any]:
    """The functions of the script, and its numbers."""
    return runpy.run_path(str(GOLDEN / f"{name}.py")), json.loads(
        (GOLDEN / f"{name}.json").read_text()
    )


def test_geneval_judges_as_its_own_script() -> None:
    script, expected = load("geneval")
    found = [script["outcome"](script["ours"](*case)) for case in script["cases"](len(expected))]
    assert found == expected
    assert 50 < sum(correct for correct, _, _ in expected) < 250


def test_dpg_bench_scores_as_its_own_script() -> None:
    script, expected = load("dpg_bench")
    assert [script["ours"](*table) for table in script["tables"](len(expected))] == expected
    assert sum(bool(table and table["dropped"]) for table in expected) > 20


class TestDetector:
    script, expected = load("mask2former")

    def test_preparation(self) -> None:
        """OpenCV's resize rounds in fixed point: one grey level at most."""
        for size, case in zip(self.script["SIZES"], self.expected["prepared"], strict=True):
            pixels, covered = prepare(self.script["image"](size), MMDET_PADDING)
            assert (list(covered), list(pixels.shape[2:])) == (case["covered"], case["padded"])
            if list(covered) != case["padded"]:
                assert pixels[0, :, -1, -1].tolist() == pytest.approx(case["margin"], abs=1e-5)
            levels = pixels[0, :, : covered[0], : covered[1]].permute(1, 2, 0) * torch.tensor(
                STD
            ) + torch.tensor(GREY)
            difference = levels.round().flatten()[:: self.script["STRIDE"]] - torch.tensor(
                case["levels"]
            )
            assert difference.abs().max() <= 1
            assert difference.abs().mean() < 0.2

    def test_network_with_converted_weights(self) -> None:
        shapes = runpy.run_path(str(Path(__file__).parent / "test_mask2former.py"))[
            "mmdet_shapes"
        ]()
        model = Mask2FormerForUniversalSegmentation(swin_small_config()).eval()
        model.load_state_dict(
            from_mmdet(self.script["weights"](shapes), model.state_dict()), strict=False
        )
        with torch.inference_mode():
            output = model(pixel_values=self.script["pixels"]())
        found = self.script["sample"](
            output.class_queries_logits[0], output.masks_queries_logits[0]
        )
        for name, values in self.expected["network"].items():
            difference = (torch.tensor(found[name]) - torch.tensor(values)).abs()
            # Attention is masked where a logit is below zero: rounding may turn a few around.
            assert difference.quantile(0.95) < 1e-3
            assert torch.tensor(values).std() > 0.3

    @pytest.mark.parametrize("number", [0, 1])
    def test_instances(self, number: int) -> None:
        found = instances(*self.script["logits"](number))
        rows = self.script["rows"]([(OBJECT_NAMES.index(d.name), d.score, d.box) for d in found])
        expected = self.expected["fused"][number]
        assert [(row[0], *row[2:]) for row in rows] == [(row[0], *row[2:]) for row in expected]
        assert [row[1] for row in rows] == pytest.approx([row[1] for row in expected], abs=2e-5)
