"""The launcher enters the model into VLMEvalKit's table, keeps its prompts and runs its `run.py`; on stand-ins of its parts."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqrae.eval import vlmevalkit


class InternVLChat:
    """What the launcher inherits: prompts and the number of tiles."""

    def set_max_num(self, dataset: str | None) -> None:
        self.max_num, self.total_max_num = 12, 64


def reorganize_prompt(message: list[dict[str, str]], image_num: int, dataset: str | None = None) -> str:
    texts = [part["value"] for part in message if part["type"] == "text"]
    return "<image>\n" + "\n".join(texts) if image_num == 1 else "Image-1: <image>\nImage-2: <image>\n" + texts[0]


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A stand-in of VLMEvalKit; what the model was asked."""
    parts: dict[str, dict[str, Any]] = {
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": {}},
        "vlmeval.vlm": {},
        "vlmeval.vlm.internvl": {"InternVLChat": InternVLChat},
        "vlmeval.vlm.internvl.utils": {"reorganize_prompt": reorganize_prompt},
    }
    for name, values in parts.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    asked: list[Any] = []
    image_processor = types.SimpleNamespace(max_patches=1)

    class FakeChat:
        processor = types.SimpleNamespace(image_processor=image_processor)

        @classmethod
        def from_pretrained(cls, path: str, **options: Any) -> "FakeChat":
            asked.append((path, options))
            return cls()

        def generate(self, chats: list[Any]) -> list[str]:
            asked.append((image_processor.max_patches, chats))
            return ["yes"]

    monkeypatch.setattr(vlmevalkit, "Chat", FakeChat)
    monkeypatch.setattr(sys, "argv", ["x"])
    for name, size in (("a.png", (10, 8)), ("b.png", (6, 6))):
        Image.new("RGB", size).save(tmp_path / name)
    return asked


def test_run_py_finds_the_model_and_gets_answers(chats: list[Any], tmp_path: Path) -> None:
    root, model = tmp_path / "kit", tmp_path / "model"
    root.mkdir()
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    picture = str(tmp_path / "a.png")
    (root / "run.py").write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "assert sys.argv[1:7] == ['--model', 'vqrae', '--data', 'MME', '--work-dir', sys.argv[6]], sys.argv\n"
        "model = supported_VLM['vqrae']()\n"
        f"message = [dict(type='image', value={picture!r}), dict(type='text', value='is it red?')]\n"
        "assert model.generate_inner(message, dataset='MME') == 'yes'\n"
        "assert sys.argv[7:] == ['--reuse']\n"
    )
    options = ["data=[MME]", f"output={tmp_path / 'out'}", "options=[--reuse]", "max_new_tokens=9"]
    vlmevalkit.main([f"root={root}", f"model={model}", *options])
    loaded, (tiles, [[turn]]) = chats
    assert loaded == (str(model), {"max_new_tokens": 9})
    assert tiles == 12
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert turn["content"][1]["text"] == "is it red?"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprints"]["model"]


def test_several_pictures_keep_their_labels_and_share_the_tiles(chats: list[Any], tmp_path: Path) -> None:
    model = vlmevalkit.model_class()("folder", max_new_tokens=8)
    message = [{"type": "image", "value": str(tmp_path / name)} for name in ("a.png", "b.png")]
    model.generate_inner([*message, {"type": "text", "value": "which?"}], dataset="MMMU_DEV_VAL")
    [[turn]] = chats[-1][1]
    kinds = [part.get("text") or part["image"].size for part in turn["content"]]
    assert kinds == ["Image-1: ", (20, 16), "Image-2: ", (6, 6), "which?"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"set root to a clone of github.com/open-compass/VLMEvalKit"):
        vlmevalkit.main([f"root={tmp_path}", "model=m", "output=o"])
    (tmp_path / "run.py").write_text("")
    with pytest.raises(SystemExit, match="pip install -e"):
        vlmevalkit.main([f"root={tmp_path}", "model=m", "output=o"])
