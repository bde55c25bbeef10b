"""The paper's tables with our rows: cells, reservations, manifests, as Markdown and as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from vqrae.common.config import ConfigError
from vqrae.common.files import read_json, write_json
from vqrae.eval.geneval.rules import summarize
from vqrae.eval.results import evaluate as results
from vqrae.eval.results.evaluate import fill_tables, paper_tables, read_score


def geneval(benchmark: str = "GenEval", suite: str = "official", **more: Any) -> dict[str, Any]:
    tags = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    rows = [{"tag": tag, "metadata": tag, "correct": i == 0} for tag in tags for i in range(4)]
    manifest = {"detector": "d", "suite": suite, "packages": {"torch": "2"}}
    manifest["images"] = {"sampling": {"guidance_scale": 4.5}}
    scores = {"benchmark": benchmark, **summarize(rows), "incomplete": []}
    return {**scores, "manifest": manifest, **more}


def dpg(
    judge: str = "mplug", questions: str = "abc", formulas: str = "published script"
) -> dict[str, Any]:
    manifest = {"judge": judge, "questions": questions, "formulas": formulas}
    counts = {"num_prompts": 1065, "num_scored": 1065}
    values = {"dpg": 71.236, "categories": {"entity": 80.0}, **counts, "manifest": manifest}
    return {"benchmark": f"DPG({judge})", **values}


def zero_shot(task: str) -> dict[str, Any]:
    stage: dict[str, Any] = {"tokenizer": "t"}
    for kind, share in (("continuous", 0.75), ("quantized", 0.5)):
        stage[kind] = {task: {"top1": share, "top5": 1.0}}
    about: dict[str, Any] = {"tasks": {task: {"count": 50_000}}, "data": "val"}
    about |= {"text_side": "own", "packages": {}}
    return {"benchmark": "zero-shot", "stages": {"stage1": {}, "stage2": stage}, **about}


FILES = ("g.json", "d.json", "r.json", "u", "z.json")
RECONSTRUCTED = {
    "psnr": 22.5, "ssim": 0.7, "rfid": 1.0, "not_measured": {}, "num_images": 50_000,
    "data": "val: 50000 images",
    "imagenet_validation": True, "image_size": 256, "protocol": {"name": "titok"},
    "tokenizer": "f" * 64,
}  # fmt: skip


def test_the_papers_numbers() -> None:
    """Our rows in the paper; a GenEval overall is the mean of its six tasks."""
    tables = paper_tables()
    for table in tables.values():
        assert all(len(row) == len(table.columns) + 1 for row in table.rows)
    assert tables["reconstruction"].rows[-2:] == [
        ["VQRAE SigLIP2", 16, 1.31, 22.23, 0.762],
        ["VQRAE InternViT", 14, 1.39, 22.88, 0.784],
    ]
    names = [str(row[0]) for row in tables["understanding"].rows]
    assert sum(name.startswith("VQRAE") for name in names) == 5
    for row in tables["generation"].rows:
        tasks = [value for value in row[2:8] if isinstance(value, float)]
        if len(tasks) == 6:
            assert row[8] == pytest.approx(sum(tasks) / 6, abs=0.0101), row[0]


def test_cells_of_each_kind(tmp_path: Path) -> None:
    write_json(tmp_path / "g.json", geneval())
    write_json(tmp_path / "d.json", dpg())
    write_json(tmp_path / "r.json", RECONSTRUCTED)
    write_json(tmp_path / "z.json", zero_shot("class"))
    pope = {"score": 88.0, "manifest": {"git_commit": "c"}, "settings": {"limit": 10}}
    write_json(tmp_path / "u" / "pope.json", pope)
    scores = {name: read_score(tmp_path / name) for name in FILES}
    tables = fill_tables(scores)["tables"]
    rows = {row["source"]: row for table in tables for row in table["rows"]}
    found = {name: rows[name]["values"] for name in scores}
    assert (found["g.json"]["Sgl"], found["g.json"]["GenEval"]) == (0.25, 0.25)
    assert (found["d.json"]["DPG"], found["d.json"]["Ent"]) == (71.236, 80)
    assert found["d.json"]["Glob"] is None
    assert found["r.json"] == {"ratio": None, "rFID": 1.0, "PSNR": 22.5, "SSIM": 0.7}
    assert found["u"]["POPE"] == 88
    assert found["z.json"] == {"continuous": 75, "quantized": 50}
    reservations = [rows[name]["reservations"] for name in scores]
    assert reservations == [[], [], [], ["pope: at most 10 questions, a trial"], []]


@pytest.mark.parametrize(
    ("stored", "reservation"),
    [
        (geneval("GenEval-HF"), "detector d instead"),
        (geneval(suite="md5:12345678"), "not the official 553"),
        (geneval(incomplete=["00003 has 1 of 4 images"]), "1 prompts lack images"),
        (dpg("vqa:blip"), "instead of mPLUG"),
        (dpg(questions="scenes"), "embedded scenes"),
        (dpg(formulas="corrected"), "corrected formulas"),
        ({**dpg(), "num_scored": 1063}, "2 of 1065 prompts"),
        ({**dpg(), "num_prompts": 9, "num_scored": 9}, "9 of DPG-Bench's 1,065 prompts"),
        ({**geneval(), "num_images": 6}, "6 images of 6 prompts"),
        ({**RECONSTRUCTED, "imagenet_validation": False}, "50000 images of val: 50000 images"),
        ({**RECONSTRUCTED, "num_images": 49_999}, "49999 images"),
        ({**RECONSTRUCTED, "image_size": 512}, "compared at 512 px"),
        (
            {**RECONSTRUCTED, "protocol": {"name": "vgt", "score_size": 256}, "image_size": 448},
            "protocol vgt",
        ),
        (zero_shot("shape"), "shape of 50000 images of val, the paper: ImageNet"),
        (
            {**RECONSTRUCTED, "rfid": None, "not_measured": {"rfid": "no weights"}},
            "rFID not measured: no weights",
        ),
    ],
)
def test_what_does_not_compare_says_so(
    stored: dict[str, Any], reservation: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "s.json", stored)
    [found] = read_score(tmp_path / "s.json").reservations
    assert reservation in found


@pytest.mark.parametrize(
    "stored", [7, {"dpg": 1}, {"benchmark": "GenEval"}, {"psnr": 1, "protocol": "x"}]
)
def test_files_that_no_evaluation_wrote_are_named(stored: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", stored)
    with pytest.raises(ValueError, match=r"x\.json is not a score as an evaluation writes it"):
        read_score(tmp_path / "x.json")


def test_unknown_scores_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"accuracy": 1})
    for path in (tmp_path / "x.json", tmp_path):
        with pytest.raises(ValueError, match=r"not a score for a table|holds no scores"):
            read_score(path)


def test_command(tmp_path: Path) -> None:
    write_json(tmp_path / "g.json", geneval("GenEval-HF"))
    write_json(tmp_path / "r.json", RECONSTRUCTED)
    scores = f"scores=[{tmp_path / 'g.json'},{tmp_path / 'r.json'}]"
    results.main([scores, f"output={tmp_path / 'results.md'}"])
    text = (tmp_path / "results.md").read_text()
    assert "| VQRAE | 0.6B | 0.96 | 0.82 | 0.64 | 0.80 | 0.73 | 0.58 | 0.76 | 89.78 |" in text
    assert "| **ours: GenEval-HF** [2] ≠ | — | 0.25 |" in text
    assert "| **ours: protocol titok** [1] | — | 1.00 | 22.50 | 0.700 |" in text
    assert '"guidance_scale": 4.5' in text
    assert "Table 3" not in text
    tables = read_json(tmp_path / "results.json")["tables"]
    assert [table["title"][:7] for table in tables] == ["Table 2", "Table 4"]
    ours = tables[1]["rows"][-1]
    assert ours["manifest"]["packages"] == {"torch": "2"}
    assert json.dumps(ours["values"]["Sgl"]) == "0.25"
    with pytest.raises(ConfigError):
        results.main([])
