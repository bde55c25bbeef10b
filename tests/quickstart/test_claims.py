"""The claims' list fits what measures it; a launch judges what there is and keeps what was."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqrae.common.files import write_json
from vqrae.eval.ablations.suites import load_suite
from vqrae.quickstart import claims, compare_features
from vqrae.quickstart.claims import ALL_METRICS, ClaimsConfig, chosen_claims

SOURCE = """
claims:
  - name: C1
    title: Continuous features are better
    paper: they are
    place: section 1
    module: vqrae.quickstart.compare_features
    arguments: ["tokenizer={tokenizer}", "llm={llm}"]
    result: scores.json
    criteria:
      - {text: they answer more, metric: accuracy, higher: continuous, lower: quantized,
         margin: 0.1}
    also:
      - {text: and reconstruct as well, metric: psnr, higher: continuous, lower: quantized,
         kind: equivalent, margin: 1}
  - name: C2
    title: Wide codebooks are used
    paper: they are
    place: section 2
    suite: two_recipes
    criteria: [{text: more, metric: psnr, higher: short/a, lower: long/a}]
"""


def test_every_criterion_is_of_what_is_measured() -> None:
    shipped = chosen_claims(ClaimsConfig())
    assert [claim.name for claim in shipped] == [f"C{number}" for number in range(1, 9)]
    for claim in shipped:
        for comparison in (*claim.criteria, *claim.also):
            assert comparison.metric in ALL_METRICS
            if claim.suite:
                suite = load_suite(claim.suite)
                several = len(suite.recipes) > 1
                rows = {f"{recipe.name}/" * several + row.name for recipe, row in suite.trials()}
                assert {comparison.higher, comparison.lower} <= rows
                assert comparison.metric in suite.columns


def test_unknown_claims_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown claim 'C11'.*C1"):
        chosen_claims(ClaimsConfig(claims=("C11",)))


def test_what_is_there_is_judged_and_the_rest_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def pretend(arguments: list[str]) -> None:
        calls.append(arguments)
        values = dict(argument.split("=", 1) for argument in arguments)
        seeds = json.loads(values["seeds"])
        rows = {
            "continuous": {"accuracy": [0.9 + 0.01 * seed for seed in seeds]},
            "quantized": {"accuracy": [0.5 + 0.01 * seed for seed in seeds]},
        }
        write_json(Path(values["output"]) / "scores.json", {"rows": rows})

    def sweep(arguments: list[str]) -> None:
        metrics = {"seed": 0, "metrics": {"psnr": 20.0}}
        rows = [{"recipe": name, "row": "a", "runs": [metrics]} for name in ("short", "long")]
        write_json(output / "ablations" / "two_recipes.json", {"rows": rows})

    monkeypatch.setattr(compare_features, "main", pretend)
    monkeypatch.setattr(claims.ablations, "main", sweep)
    source, output = tmp_path / "mine.yaml", tmp_path / "claims"
    source.write_text(SOURCE)
    arguments = [f"source={source}", f"output={output}", "tokenizer=t", "llm=l", "seeds=2"]
    claims.main([*arguments, "claims=[C1]", "minutes=0"])
    assert calls == []
    assert "Missing: continuous has 0 of 2 seeds" in (output / "claims.md").read_text()

    claims.main([*arguments, "claims=[C1]"])
    assert [call[-1] for call in calls] == ["seeds=[0]", "seeds=[0, 1]"]
    assert calls[0][:2] == ["tokenizer=t", "llm=l"]
    claims.main([*arguments, "claims=[C2]"])
    found: dict[str, Any] = json.loads((output / "claims.json").read_text())
    assert {name: each["verdict"] for name, each in found.items()} == {
        "C1": "confirmed",
        "C2": "undecided",
    }
    assert found["C2"]["missing"] == ["short/a has 1 of 2 seeds", "long/a has 1 of 2 seeds"]
    text = (output / "claims.md").read_text()
    line = "| they answer more | questions answered | 10.0 points | confirmed (+40.0 points, "
    assert line in text
    assert "| (and reconstruct as well) | PSNR, dB | ±1.00 | missing |" in text
    assert Image.open(output / "C1.png").width > 500
