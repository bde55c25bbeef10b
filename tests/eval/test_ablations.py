"""Ablation suites: every row can be trained, a sweep ends in a table, claims are judged."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel

from vqrae.common.config import ConfigError, load_config, shipped_config
from vqrae.common.files import write_json
from vqrae.eval.ablations import evaluate as ablations
from vqrae.eval.ablations.evaluate import AblationConfig, plan_trials, sweep
from vqrae.eval.ablations.suites import SUITES, Recipe, Suite, TableRow, load_suite
from vqrae.eval.ablations.tables import measurements
from vqrae.eval.verdicts import Claim, effect
from vqrae.quickstart import locality
from vqrae.quickstart.pretrain_encoder import EncoderPretrainingConfig
from vqrae.tokenizer.build import build_tokenizer

SUITE = """
title: Two rows
columns: [frechet, psnr, codebook_usage, teacher_cosine, linear_continuous, known_share, held_out]
codes_evaluator: vqrae.quickstart.locality
overrides:
  - log_steps=1
  - model.codebook_dim=16
  - model.codebook_size=32
  - stage1.max_steps=1
  - stage2.max_steps=1
  - stage2.bypass_steps=0
  - stage1.global_batch_size=4
  - stage1.micro_batch_size=4
  - stage2.global_batch_size=4
  - stage2.micro_batch_size=4
recipes: [{name: short, note: hardly any training}]
rows:
  - {name: two, labels: {stages: 2}, paper: "good"}
  - {name: one, labels: {stages: 1}, overrides: [stage1.max_steps=0]}
claims:
  - {text: two are better than one, metric: psnr, higher: two, lower: one}
"""


def suite(**changes: Any) -> Suite:
    values: dict[str, Any] = {
        "title": "t",
        "columns": ("psnr",),
        "recipes": (Recipe(name="plain", note="n"),),
        "rows": (
            TableRow(name="a", labels={"dim": 1}),
            TableRow(name="b", labels={"dim": 2}, paper="5 dB"),
        ),
        "claims": (Claim(text="a is better", metric="psnr", higher="a", lower="b"),),
    }
    return Suite(**{**values, **changes})


# ---- suites


@pytest.mark.parametrize("name", SUITES)
def test_every_shipped_row_can_be_trained(name: str) -> None:
    tiny = shipped_config("vqrae.quickstart", "tiny_encoder")
    encoder = load_config(EncoderPretrainingConfig, tiny, ["output_dir=runs/encoder"])
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **encoder.vision}
    _, trials = plan_trials(name, load_suite(name), AblationConfig(seeds=2))
    assert len({trial.folder for trial in trials}) == len(trials)
    configs = [dataclasses.replace(trial.config, output_dir="") for trial in trials]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])  # no two rows are equal
    for config in configs[: len(trials) // 2]:
        model = config.model
        if model.encoder is not None:
            model = dataclasses.replace(model, encoder=None, encoder_config=vision)
        build_tokenizer(model, "eager")


def test_mistakes_in_a_suite_are_named() -> None:
    same = TableRow(name="a", labels={})
    wrong: dict[str, dict[str, Any]] = {
        "unknown metric 'psnrr'": {"columns": ("psnrr",)},
        r"row names: got \['a', 'a'\]": {"rows": (same, same)},
        "unknown row 'c'": {"claims": (Claim(text="x", metric="psnr", higher="a", lower="c"),)},
        "unknown recipe 'tiny'": {"rows": (dataclasses.replace(same, recipes=("tiny",)),)},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            suite(**changes)
    with pytest.raises(ConfigError, match=r"model\.codebook_dims: unknown key"):
        plan_trials("s", suite(overrides=("model.codebook_dims=3",)), AblationConfig())
    emoji = AblationConfig(data="emoji")
    with pytest.raises(ValueError, match="emoji has no labels: give labelled_data="):
        plan_trials("s", suite(columns=("linear_continuous",)), emoji)
    with pytest.raises(ValueError, match="asks what codes know of scenes, got data=emoji"):
        plan_trials("s", suite(columns=("known_share",)), emoji)


# ---- a sweep


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 64, "patch_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "vision_use_head": False}
    SiglipVisionModel(SiglipVisionConfig(**sizes, **layers)).save_pretrained(folder)
    return folder


def test_a_sweep_ends_in_a_table_and_is_not_repeated(
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, output = tmp_path / "mine.yaml", tmp_path / "ablations"
    file.write_text(SUITE)
    few = ["num_images=8", "num_train=24", "num_test=8", "data=scenes:emoji"]
    arguments = [f"suite={file}", f"output={output}", f"encoder={encoder}", *few]

    def pretend(arguments: list[str]) -> None:
        assert "sprites=emoji" in arguments
        shares = {"seen": 0.9, "held_out": 0.8}
        target = next(text for text in arguments if text.startswith("output="))
        write_json(
            target[7:], {"known_share": 0.5, "code_given_patch": 1.5, "reconstruction": shares}
        )

    monkeypatch.setattr(locality, "main", pretend)
    ablations.main(arguments)
    values = json.loads((output / "mine.json").read_text())
    assert [row["row"] for row in values["rows"]] == ["two", "one"]
    for row in values["rows"]:
        [run] = row["runs"]
        assert run["metrics"]["psnr"] > 5
        assert run["metrics"]["frechet"] > 0
        assert run["metrics"]["held_out"] == 0.8
        assert 0 < run["metrics"]["teacher_cosine"] <= 1.00001
    assert set(values["original_features"]) == {"linear_continuous", "linear_chance"}
    assert (output / "mine" / "short" / "one" / "seed-0" / "model" / "config.json").is_file()
    page = (output / "mine.md").read_text()
    assert "| stages | frechet_encoder | PSNR, dB | usage |" in page
    assert "| two are better than one | PSNR, dB | undecided (" in page  # one seed
    assert page in capsys.readouterr().out

    monkeypatch.setattr(ablations, "train_and_score", None)
    ablations.main(arguments)
    assert json.loads((output / "mine.json").read_text())["rows"] == values["rows"]
    with pytest.raises(ValueError, match=r"ablation.json .*stage2\.max_steps 1 -> 3"):
        ablations.main([*arguments, "overrides=[stage2.max_steps=3]"])


def test_a_row_that_diverges_leaves_the_others(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(module: Any, arguments: list[str], nproc: int) -> None:
        assert nproc == 4
        if f"output_dir={tmp_path}/s/plain/a/seed-0" in arguments:
            raise FloatingPointError("no finite gradient")

    monkeypatch.setattr(ablations, "run_module", train)
    monkeypatch.setattr(ablations, "score_reconstruction", lambda *a: {"psnr": 20.0})
    config = AblationConfig(encoder=str(encoder), output=str(tmp_path), seeds=2, nproc=4)
    sweep("s", suite(), dataclasses.replace(config, minutes=0))  # the table, but no run
    assert [row["runs"] for row in json.loads((tmp_path / "s.json").read_text())["rows"]] == [
        [],
        [],
    ]
    sweep("s", suite(), config)
    lines = (tmp_path / "s.md").read_text().splitlines()
    assert "| 1 | 20.00 (1 diverged) |  |" in lines
    assert "| 2 | 20.00 ± 0.00 | 5 dB |" in lines


# ---- what the numbers say


def result(row: str, *values: float | None, recipe: str = "plain") -> dict[str, Any]:
    metrics = [{"diverged": "x"} if value is None else {"psnr": value} for value in values]
    runs = [{"seed": i, "metrics": found} for i, found in enumerate(metrics)]
    return {"recipe": recipe, "row": row, "labels": {"dim": row}, "paper": "", "runs": runs}


def test_a_claim_is_judged_in_each_recipe() -> None:
    claim = Claim(text="", metric="psnr", higher="a", lower="b")
    results = [result("a", 20.0, 20.2, None), result("b", 19.0, 19.2)]
    assert effect(claim, measurements(results, "plain"))["verdict"] == "confirmed"
    assert effect(claim, measurements(results, "tiny")) is None
