"""The comparison of features: end to end in a few steps."""

import json
from pathlib import Path

import pytest

from vqrae.common.files import weights_fingerprint
from vqrae.quickstart import compare_features as feature_quality
from vqrae.tokenizer import train as tokenizer_training

ENCODER = (
    "{model_type: siglip_vision_model, hidden_size: 32, intermediate_size: 64, image_size: 64,"
    " num_hidden_layers: 1, num_attention_heads: 2, patch_size: 16, vision_use_head: false}"
)
STEPS = ["stage1.max_steps=1", "stage2.max_steps=2", "stage2.bypass_steps=1"]
BATCH = [
    f"{stage}.{key}=4"
    for stage in ("stage1", "stage2")
    for key in ("global_batch_size", "micro_batch_size")
]


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages of a tokenizer, one or two steps each."""
    run = tmp_path_factory.mktemp("tokenizer")
    model = ["model.encoder=", f"model.encoder_config={ENCODER}"]
    model += ["model.codebook_size=32", "model.codebook_dim=32", "sample_steps=100"]
    tokenizer_training.main(["tiny", f"output_dir={run}", *model, *STEPS, *BATCH])
    return run


def test_all_four_kinds_in_one_command(
    tokenizer_run: Path, llm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("max_steps=1", "global_batch_size=2", "micro_batch_size=2")
    sizes = [f"pretrain.{step}" for step in steps] + [f"sft.{step}" for step in steps]
    command = [f"tokenizer={tokenizer_run}", f"llm={llm_folder}", f"output={tmp_path}"]
    command.append(f"training=[{', '.join(sizes)}]")
    feature_quality.main([*command, "num_images=2"])
    scores = json.loads((tmp_path / "scores.json").read_text())["kinds"]
    assert tuple(scores) == feature_quality.KINDS
    stages = {
        name: weights_fingerprint(tokenizer_run / name / "model") for name in ("stage1", "stage2")
    }
    assert scores["original"]["tokenizer"] == stages["stage1"]
    assert scores["distilled"]["tokenizer"] == scores["quantized"]["tokenizer"] == stages["stage2"]
    assert scores["undistilled"]["tokenizer"] not in stages.values()
    assert set(scores["quantized"]["seeds"]) == {"0"}
    table = (tmp_path / "scores.md").read_text()
    assert all(f"| {kind} |" in table for kind in feature_quality.KINDS)
    for kind, tower in (("distilled", "siglip_vision_model"), ("quantized", "vqrae_features")):
        config = json.loads((tmp_path / f"{kind}-0" / "model" / "config.json").read_text())
        assert config["vision_config"]["model_type"] == tower
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    capsys.readouterr()
    feature_quality.main([*command, "num_images=2"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
    assert "questions" not in capsys.readouterr().err  # nothing was asked again


def test_only_the_kinds_that_are_asked_for(
    tokenizer_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tokenizer is trained, and quantized features have the distilled tokenizer's PSNR."""
    scores = {"accuracy": 0.5, "held_out": 0.25, "kinds": {"color": 0.75}}
    monkeypatch.setattr(feature_quality, "score_llava", lambda *args: scores)
    common = {"tokenizer": str(tokenizer_run), "llm": "l", "output": str(tmp_path)}
    config = feature_quality.FeatureQualityConfig(
        **common, kinds=["quantized", "distilled"], num_images=2, seeds=[0, 1]
    )
    result = feature_quality.compare(config)
    expected = {"accuracy": [0.5, 0.5], "held_out": [0.25, 0.25], "color": [0.75, 0.75]}
    assert result["rows"]["quantized"] == expected
    kinds = result["kinds"]
    assert list(kinds) == ["distilled", "quantized"]
    assert kinds["distilled"]["psnr"] == kinds["quantized"]["psnr"]
    assert not (tmp_path / "tokenizer_undistilled").exists()
    with pytest.raises(ValueError, match="kinds: got none, expected at least one"):
        feature_quality.FeatureQualityConfig(**common, kinds=[])


def test_a_run_without_both_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"config.yaml does not exist: give the run directory"
    ):
        feature_quality.main([f"tokenizer={tmp_path}", "llm=l", f"output={tmp_path / 'out'}"])


def test_several_seeds_show_their_range() -> None:
    common = {"held_out": 0.5, "kinds": {"yes_no": 0.5}, "blind_accuracy": 0.25}
    common |= {"num_questions": 9, "num_images": 3}
    seeds = {str(i): {**common, "accuracy": score} for i, score in enumerate((0.5, 0.7))}
    text = feature_quality.comparison_table({"original": {"psnr": 20.0, "seeds": seeds}})
    assert "60.0% (50.0% to 70.0%)" in text
    assert "2 seeds (mean and range)" in text
