"""Ablation suites: every row is valid, a sweep of two steps ends in a table, finished runs are read, claims are judged."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel

from vqrae.common.config import ConfigError, load_config, shipped_config
from vqrae.common.files import write_json
from vqrae.eval.ablations import evaluate as ablations
from vqrae.eval.ablations.evaluate import Ablation, AblationConfig
from vqrae.eval.ablations.suites import SUITES, Claim, Recipe, Row, Suite, load_suite, suite_names
from vqrae.eval.ablations.tables import cell, judge, markdown, verdict
from vqrae.quickstart.pretrain_encoder import EncoderPretrainingConfig
from vqrae.tokenizer.build import build_tokenizer

SUITE = """
title: Two rows
columns: [frechet, psnr, codebook_usage, teacher_cosine, linear_continuous]
overrides: [log_steps=1, model.codebook_dim=16, model.codebook_size=32, stage1.max_steps=1, stage2.max_steps=2]
recipes: [{name: short, note: hardly any training, overrides: [stage2.bypass_steps=1]}]
rows:
  - {name: two, labels: {stages: 2}, paper: "good"}
  - {name: one, labels: {stages: 1}, overrides: [stage1.max_steps=0]}
claims:
  - {text: two are better than one, metric: psnr, higher: two, lower: one}
"""
FEW = ["num_images=8", "num_train=24", "num_test=8"]


# ---- suites


@pytest.mark.parametrize("name", SUITES)
def test_every_shipped_row_can_be_trained(name: str) -> None:
    encoder = load_config(
        EncoderPretrainingConfig,
        shipped_config("vqrae.quickstart", "tiny_encoder"),
        ["output_dir=runs/encoder"],
    )
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **encoder.vision}
    ablation = Ablation(name, load_suite(name), AblationConfig(seeds=2))
    assert len(ablation.runs) == 2 * len(ablation.suite.trials())
    assert len({run.folder for run in ablation.runs}) == len(ablation.runs)
    assert len({json.dumps(run.settings()) for run in ablation.runs}) == len(
        ablation.runs
    )  # no two rows are the same
    for run in ablation.runs[: len(ablation.suite.trials())]:
        model = dataclasses.replace(run.config.model, encoder=None, encoder_config=vision)
        build_tokenizer(model, "eager")


def suite(**changes: Any) -> Suite:
    values: dict[str, Any] = {
        "title": "t",
        "columns": ("psnr",),
        "recipes": (Recipe(name="plain", note="n"),),
        "rows": (Row(name="a", labels={"dim": 1}), Row(name="b", labels={"dim": 2}, paper="5 dB")),
        "claims": (Claim(text="a is better", metric="psnr", higher="a", lower="b"),),
    }
    return Suite(**{**values, **changes})


def test_mistakes_in_a_suite_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown metric 'psnrr'"):
        suite(columns=("psnrr",))
    with pytest.raises(ValueError, match=r"row names: got \['a', 'a'\]"):
        suite(rows=(Row(name="a", labels={}), Row(name="a", labels={})))
    with pytest.raises(ValueError, match="unknown row 'c'"):
        suite(claims=(Claim(text="x", metric="psnr", higher="a", lower="c"),))
    with pytest.raises(ValueError, match="unknown recipe 'tiny'"):
        suite(rows=(Row(name="a", labels={}, recipes=("tiny",)),), claims=())
    with pytest.raises(ConfigError, match=r"model\.codebook_dims: unknown key"):
        Ablation("s", suite(overrides=("model.codebook_dims=3",)), AblationConfig())
    with pytest.raises(ValueError, match="emoji has no labels: give labelled_data="):
        Ablation("s", suite(columns=("linear_continuous",)), AblationConfig(data="emoji"))
    with pytest.raises(ValueError, match="asks what codes know of scenes, got data=emoji"):
        Ablation("s", suite(columns=("known_share",)), AblationConfig(data="emoji"))
    with pytest.raises(ValueError, match="must be positive"):
        AblationConfig(seeds=0)


def test_what_codes_know_is_asked_of_the_scenes_they_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def pretend(arguments: list[str]) -> None:
        asked.append(arguments)
        write_json(
            tmp_path / "locality.json",
            {"known_share": 0.5, "reconstruction": {"seen": 0.9, "held_out": 0.8}},
        )

    monkeypatch.setattr("vqrae.quickstart.locality.main", pretend)
    ablation = Ablation(
        "s",
        suite(columns=("known_share", "held_out"), codes_evaluator="vqrae.quickstart.locality"),
        AblationConfig(data="scenes:emoji"),
    )
    assert ablation._locality(tmp_path / "model") == {
        "known_share": 0.5,
        "seen": 0.9,
        "held_out": 0.8,
    }
    assert "sprites=emoji" in asked[0]


def test_all_is_every_shipped_suite_and_a_file_is_its_own() -> None:
    assert list(suite_names("all")) == list(SUITES)
    assert suite_names("some/where/mine.yaml") == {"mine": "some/where/mine.yaml"}


# ---- a sweep


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    SiglipVisionModel(
        SiglipVisionConfig(image_size=64, patch_size=8, vision_use_head=False, **sizes)
    ).save_pretrained(folder)
    return folder


def test_a_sweep_ends_in_a_table_and_is_not_repeated(
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, output = tmp_path / "mine.yaml", tmp_path / "ablations"
    file.write_text(SUITE)
    arguments = [f"suite={file}", f"output={output}", f"encoder={encoder}", *FEW]
    ablations.main(arguments)
    values = json.loads((output / "mine.json").read_text())
    assert [row["row"] for row in values["rows"]] == ["two", "one"]
    for row in values["rows"]:
        [run] = row["runs"]
        assert run["metrics"]["psnr"] > 5
        assert run["metrics"]["frechet"] > 0
        assert 0 < run["metrics"]["teacher_cosine"] <= 1.00001
        assert set(values["original_features"]) == {"linear_continuous", "linear_chance"}
    assert (output / "mine" / "short" / "one" / "seed-0" / "model" / "config.json").is_file()
    page = (output / "mine.md").read_text()
    assert "| stages | frechet_encoder | PSNR, dB | usage |" in page
    assert "| two are better than one | PSNR, dB | not separable (" in page  # of one seed
    assert page in capsys.readouterr().out

    for work in ("_train", "_reconstruction"):
        monkeypatch.setattr(Ablation, work, None)
    ablations.main(arguments)
    assert json.loads((output / "mine.json").read_text())["rows"] == values["rows"]
    with pytest.raises(
        ValueError,
        match=r"seed-0 was trained with stage2\.max_steps=2 \(now 3\): give another output=",
    ):
        ablations.main([*arguments, "overrides=[stage2.max_steps=3]"])


def test_a_row_that_diverges_leaves_the_others(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Ablation, arguments: list[str]) -> None:
        if f"output_dir={tmp_path}/s/plain/a/seed-0" in arguments:
            raise FloatingPointError("no finite gradient")

    monkeypatch.setattr(Ablation, "_train", fail)
    monkeypatch.setattr(Ablation, "_reconstruction", lambda self, model: {"psnr": 20.0})
    monkeypatch.setattr(ablations, "weights_fingerprint", lambda folder: "0" * 64)
    config = AblationConfig(encoder=str(encoder), output=str(tmp_path), seeds=2)
    ablation = Ablation("s", suite(), config)
    ablation.execute()
    lines = (tmp_path / "s.md").read_text().splitlines()
    assert "| 1 | 20.00 (1 diverged) |  |" in lines
    assert "| 2 | 20.00 ± 0.00 | 5 dB |" in lines


def test_several_processes_are_launched_by_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    ablation = Ablation("s", suite(), AblationConfig(output=str(tmp_path), nproc=4))
    ablation._train(["tiny"])
    assert commands[0][1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "4",
        "-m",
        *commands[0][7:],
    ]
    assert commands[0][7:] == ["vqrae.tokenizer.train", "tiny"]


# ---- what the numbers say


def result(row: str, *values: float | None, recipe: str = "plain") -> dict[str, Any]:
    runs = [
        {"seed": i, "metrics": {"diverged": "x"} if v is None else {"psnr": v}}
        for i, v in enumerate(values)
    ]
    return {"recipe": recipe, "row": row, "labels": {}, "paper": "", "runs": runs}


def test_verdicts() -> None:
    assert verdict([20.0, 20.2], [19.0, 19.1], noise=0.1) == "confirmed"
    assert verdict([19.0, 19.1], [20.0, 20.2], noise=0.1) == "refuted"
    assert verdict([20.0, 20.2], [20.1, 20.3], noise=0.1) == "not separable"  # ranges overlap
    assert (
        verdict([20.0, 20.0], [19.9, 19.9], noise=0.2) == "not separable"
    )  # apart, but by less than seeds differ
    assert (
        verdict([20.0], [10.0], noise=0.0) == "not separable"
    )  # one seed says nothing about noise


def test_a_claim_is_judged_against_the_spread_of_all_rows() -> None:
    claim = Claim(text="", metric="psnr", higher="a", lower="b")
    results = [result("a", 20.0, 20.2), result("b", 19.0, 19.2)]
    assert judge(claim, results, "plain") == "confirmed (20.10 : 19.10)"
    assert judge(claim, [*results, result("c", 10.0, 18.0)], "plain").startswith("not separable")
    assert judge(claim, results, "tiny") == ""


def test_cells() -> None:
    assert cell(result("a", 20.0, 20.5), "psnr") == "20.25 ± 0.25"
    assert cell(result("a", 20.0), "psnr") == "20.00"
    assert cell(result("a", 20.0, None), "psnr") == "20.00 (1 diverged)"
    assert cell(result("a", None), "psnr") == "diverged"
    assert cell(result("a"), "psnr") == ""
    assert cell(result("a", 20.0), "ssim") == "not measured"


def test_the_page_of_two_recipes() -> None:
    tiny = Recipe(name="tiny", note="ours")
    both = suite(recipes=(Recipe(name="plain", note="the paper's"), tiny))
    results = [
        result("a", 20.0, 20.0),
        result("b", 19.0, 19.0),
        result("a", recipe="tiny"),
        result("b", recipe="tiny"),
    ]
    claims = [
        {"text": "a is better", "metric": "psnr", "verdicts": {"plain": "confirmed", "tiny": ""}}
    ]
    values = {
        "rows": results,
        "claims": claims,
        "frechet": "rfid",
        "notes": ["a note"],
        "original_features": {},
    }
    assert markdown(values, both).splitlines() == [
        "# t",
        "",
        "| recipe | dim | PSNR, dB | the paper |",
        "|---|---:|---:|---:|",
        "| plain | 1 | 20.00 ± 0.00 |  |",
        "| plain | 2 | 19.00 ± 0.00 | 5 dB |",
        "| tiny | 1 |  |  |",
        "| tiny | 2 |  | 5 dB |",
        "",
        "- a note",
        "- `plain`: the paper's",
        "- `tiny`: ours",
        "",
        "| what the paper finds | compared by | in `plain` | in `tiny` |",
        "|---|---:|---:|---:|",
        "| a is better | PSNR, dB | confirmed |  |",
    ]
