"""DPG-Bench's official judge: numbers of modelscope's own preprocessor, model and decoding."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from vqrae.eval.judges.judge import build_judge
from vqrae.eval.judges.mplug import MPlug, _model_code

GOLDEN = Path(__file__).parent / "golden" / "mplug.json"
HELPERS = runpy.run_path(str(GOLDEN.with_suffix(".py")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mplug")
    torch.set_num_threads(1)
    HELPERS["write_checkpoint"](folder, _model_code())
    return folder


def test_answers_are_those_of_modelscope(checkpoint: Path) -> None:
    """In batches, where modelscope asks one by one."""
    expected = json.loads(GOLDEN.read_text())
    pairs = HELPERS["pairs"]()
    judge = MPlug(str(checkpoint), batch_size=5)
    assert judge.answer(pairs) == [case["answer"] for case in expected]
    assert len({case["answer"] for case in expected}) > 6
    images, questions = judge._inputs(pairs)
    assert questions.input_ids.tolist() == [case["question"] for case in expected]
    pixels = torch.tensor([case["pixels"] for case in expected])
    torch.testing.assert_close(images[:, :, ::16, ::16].flatten(1), pixels, rtol=0, atol=1e-6)
    with torch.inference_mode():
        ids, scores = judge.model(images, questions, train=False)
    assert [best.tolist() for [best] in ids] == [case["ids"] for case in expected]
    found = [float(best) for [best] in scores]
    assert found == pytest.approx([case["score"] for case in expected], abs=1e-3)


def test_random_weights_and_other_folders_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "config_bert.json", "vocab.txt"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no pytorch_model\.bin, expected modelscope's damo/"):
        MPlug(str(tmp_path))
    [(key, stored)] = torch.load(checkpoint / "pytorch_model.bin").items()
    stored["model.visn_fc.bias"][0] = torch.nan
    torch.save({key: stored}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"visn_fc\.bias holds values that are not finite"):
        MPlug(str(tmp_path))
    del stored["model.fusion_encoder.encoder.layer.0.attention.self.query.weight"]
    torch.save({key: stored}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks 1 tensors of mPLUG, such as fusion_encoder\.enc"):
        MPlug(str(tmp_path))


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelscope"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "addict", None)
    with pytest.raises(ValueError, match=r"needs the package addict: pip install -e \.\[mplug\]"):
        build_judge("mplug")
