"""The scaling of the generator: sizes, their compute, the fit, and runs that are not repeated."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vqrae.common.files import read_json
from vqrae.data.code_shards import read_manifest
from vqrae.generation import extract_codes
from vqrae.generation.heads import SingleCodeHead
from vqrae.generation.modeling import VisualVocabulary, build_generator
from vqrae.generation.train import visual_loss
from vqrae.quickstart import scaling
from vqrae.quickstart.scaling import ScalingConfig, fit_law, training_flops


@pytest.fixture(scope="module")
def command(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three sizes in six steps of two images, on a code set of sixteen."""
    codes = tmp_path_factory.mktemp("codes") / "set"
    source = ["tiny", f"tokenizer={tokenizer_folder}", "size=16", "shard_size=16"]
    extract_codes.main([*source, f"output_dir={codes}"])
    sizes = ["sizes=[1x8,1x16,2x16]", "seeds=[0]", "steps=6", "batch=2", "num_images=4"]
    return [f"codes={codes}", f"tokenizer={tokenizer_folder}", *sizes]


def test_a_curve_for_each_size_that_is_not_measured_again(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling.main([*command, f"output={tmp_path}"])
    result = read_json(tmp_path / "scaling.json")
    small, _, large = result["sizes"].values()
    # A layer: three projections D x D (keys and values of half the heads), an MLP of 9 D D, four
    # norms, two of which are of heads.
    assert small["parameters"] == 12 * 8**2 + 2 * 8 + 2 * 2 + 8
    assert large["parameters"] == 2 * (12 * 16**2 + 2 * 16 + 2 * 4) + 16
    assert [images for images, _ in large["curves"][0]] == [2, 4, 6, 8, 10, 12]
    assert result["rows"]["2x16"]["loss"] == [large["curves"][0][-1][1]]
    assert len(result["rows"]["frontier"]["exponent"]) == 1
    assert "| 2x16 | 0.01 M |" in (tmp_path / "scaling.md").read_text()
    held_out = read_manifest(tmp_path / "held_out")
    assert (held_out.source, held_out.num_images) == ("scenes (validation, seed 0)", 4)
    assert Image.open(tmp_path / "scaling.png").width > 800
    assert len([*tmp_path.glob("*/checkpoint-*")]) == 3  # the last of each run
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    capsys.readouterr()
    scaling.main([*command, f"output={tmp_path}"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
    assert capsys.readouterr().out.count("is finished (6 steps)") == 3
    assert read_json(tmp_path / "scaling.json")["sizes"] == result["sizes"]


def test_no_image_is_shown_twice(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 16 images, expected 24 to train on, each once"):
        scaling.main([*command, "steps=12", f"output={tmp_path}"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=7", "steps: got 7, expected a multiple of 6"),
        ("sizes=[4x192]", "1 sizes, expected a seed or more and 3 or 4 sizes"),
        ("seeds=[]", "got 0 seeds"),
        ("sizes=[2x96,4x192,6x]", "got '6x', expected LAYERSxWIDTH such as 4x192"),
        ("sizes=[2x96,4x192,6x100]", "a multiple of 8"),
    ],
)
def test_refusals(argument: str, message: str, command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.main([*command, argument, f"output={tmp_path}"])


def test_compute_is_what_torch_counts() -> None:
    config = ScalingConfig(codes="c", tokenizer="t", output="o")
    options = dict(option.split("=", 1) for option in config.arguments("3x64", 0) if "=" in option)
    prefix = "model.llm_config."
    sizes = {k.removeprefix(prefix): int(v) for k, v in options.items() if k.startswith(prefix)}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    vocabulary = VisualVocabulary(offset=40, codebook_size=200, num_codes=24)
    model = build_generator(vocabulary, llm_config=sizes, attention="eager")
    expected = training_flops(model, 32)
    model.lm_head = SingleCodeHead(model.lm_head, vocabulary.code_rows)
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "codes": torch.arange(24)[None]}
    batch["attention_mask"] = torch.ones(1, 32, dtype=torch.long)
    batch["position_ids"] = torch.arange(32)[None]
    with FlopCounterMode(display=False) as counter:
        visual_loss(model, batch, vocabulary).backward()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("alpha", [0.34, -0.2])
def test_the_fit_recovers_a_known_law(alpha: float) -> None:
    """Also of models that become worse with size."""
    points = []
    for millions, images in itertools.product((0.2, 1.8, 4.7), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)):
        loss = 1.2 + 0.4 * millions**-alpha + 1.9 * images**-0.45
        points.append((millions, images, loss))
    found = fit_law(points)
    assert found["floor"] == pytest.approx(1.2, abs=0.02)
    assert found["size_exponent"] == pytest.approx(alpha, abs=0.01)
    assert found["data_exponent"] == pytest.approx(0.45, abs=0.01)
    assert found["exponent"] == pytest.approx(alpha * 0.45 / (alpha + 0.45), abs=0.01)
