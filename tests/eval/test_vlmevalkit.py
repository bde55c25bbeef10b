"""The launcher's model answers what VLMEvalKit asks: a stand-in that calls as `infer_data` does.

VLMEvalKit is not a package and needs sixty others. At e8e78f05 its own `run.py` was run with the
launcher; what it asked of the model, in which order, is what `RUN` below asks.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GotOcr2ImageProcessor

from vqrae.eval.understanding import vlmevalkit
from vqrae.understanding.chat import Chat

RUN = """
import json, sys
from pathlib import Path
import vlmeval.config as config
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert list(options) == ["--model", "--data", "--work-dir", "--judge"], sys.argv
name, data, folder = options["--model"], options["--data"], Path(options["--work-dir"])
line = config.line
status = {"prediction_file": "x.xlsx"}
try:
    model = config.supported_VLM[name]()
    assert not getattr(model, "is_api", False)
    model.set_dump_image(config.dump_image)
    assert hasattr(model, "use_custom_prompt") and model.use_custom_prompt(data)
    struct = model.build_prompt(line, dataset=data)
    config.answers.append(model.generate(message=struct, dataset=data))
except Exception as error:
    status["error_message"] = str(error)
run = folder / name / "T20260818"
run.mkdir(parents=True)
(run / "status.json").write_text(json.dumps({"datasets": {data: status}}))
"""


class AutoModel:
    """What the kit loads weights with."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("the kit loads weights of its own")


AutoTokenizer = AutoModel


class BaseModel:
    """A model of the kit: content is checked, then answered."""

    allowed_types = ("text", "image", "video")
    dump_image_func: Any

    def set_dump_image(self, function: Any) -> None:
        self.dump_image_func = function

    def dump_image(self, line: dict[str, Any], dataset: str) -> list[str]:
        return self.dump_image_func(line)

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


class InternVLChat(BaseModel):
    """What the launcher inherits: prompts, and the number of tiles."""

    def __init__(
        self, model_path: str, use_custom_prompt: bool = True, version: str = "V1.0", **options: Any
    ) -> None:
        module = sys.modules[InternVLChat.__module__]
        self._use_custom_prompt, self.screen_parse = use_custom_prompt, True
        self.tokenizer = module.AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
        self.model = module.AutoModel.from_pretrained(model_path, device_map="auto").eval()
        self.version, self.kwargs = version, {"do_sample": False, "max_new_tokens": 4096} | options

    def use_custom_prompt(self, dataset: str) -> bool:
        return self._use_custom_prompt

    def build_prompt(self, line: dict[str, Any], dataset: str) -> list[dict[str, str]]:
        assert self.screen_parse
        assert self.kwargs["max_new_tokens"]
        paths = self.dump_image(line, dataset)
        images = [{"type": "image", "value": path} for path in paths]
        return [{"type": "text", "value": f"{line['question']}\nAnswer with the letter."}, *images]

    def set_max_num(self, dataset: str | None) -> None:
        self.max_num, self.total_max_num = 12 if dataset == "MMMU_DEV_VAL" else 6, 64


def reorganize_prompt(
    message: list[dict[str, str]], image_num: int, dataset: str | None = None
) -> str:
    text = "\n".join(part["value"] for part in message if part["type"] == "text")
    if dataset == "BMMR":
        return text
    if image_num == 1:
        return f"<image>\n{text}"
    return "".join(f"Image-{i + 1}: <image>\n" for i in range(image_num)) + text


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """The kit's modules; `config` also holds the question that its run.py asks, and the answers."""
    for name, size in (("a.png", (10, 8)), ("b.png", (6, 6))):
        Image.new("RGB", size).save(tmp_path / name)
    values = {"supported_VLM": {}, "line": {"question": "what color is it ?"}, "answers": []}
    parts: dict[str, dict[str, Any]] = {
        "vlmeval": {},
        "vlmeval.config": values | {"dump_image": lambda line: [str(tmp_path / "a.png")]},
        "vlmeval.vlm": {},
        "vlmeval.vlm.internvl": {"InternVLChat": InternVLChat},
        "vlmeval.vlm.internvl.utils": {"reorganize_prompt": reorganize_prompt},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vlmeval"].config = sys.modules["vlmeval.config"]  # type: ignore[attr-defined]
    module = types.ModuleType("internvl_chat")
    vars(module).update(AutoModel=AutoModel, AutoTokenizer=AutoTokenizer)
    monkeypatch.setitem(sys.modules, "internvl_chat", module)
    monkeypatch.setattr(InternVLChat, "__module__", "internvl_chat")
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "run.py").write_text(RUN)
    return sys.modules["vlmeval.config"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `Chat` was asked."""
    found: list[Any] = []
    generate = Chat.generate

    def record(self: Chat, chats: list[Any], **options: Any) -> list[str]:
        found.extend(chats)
        return generate(self, chats, **options)

    monkeypatch.setattr(Chat, "generate", record)
    return found


def launch(tmp_path: Path, llava: Path) -> None:
    options = ["data=[tiny_mcq]", "options=[--judge, exact_matching]", "max_new_tokens=4"]
    places = [f"root={tmp_path}", f"model={llava}", f"output={tmp_path / 'out'}"]
    vlmevalkit.main([*places, *options])


def test_run_py_gets_an_answer_to_its_prompt(
    kit: Any, asked: list[Any], llava: Path, tmp_path: Path
) -> None:
    launch(tmp_path, llava)
    [answer] = kit.answers
    assert isinstance(answer, str)
    [[turn]] = asked
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert turn["content"][0]["image"].size == (10, 8)
    assert turn["content"][1]["text"] == "what color is it ?\nAnswer with the letter."
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprints"]["model"]


def test_an_error_that_run_py_passes_over_ends_the_launch(
    kit: Any, llava: Path, tmp_path: Path
) -> None:
    kit.dump_image = lambda line: [str(tmp_path / "missing.png")]
    with pytest.raises(SystemExit, match=r"^tiny_mcq failed: .*missing\.png: no such file"):
        launch(tmp_path, llava)
    skipped = {"MMEE": {"skip_reason": "invalid_dataset"}, "MME": {"skip_reason": "mode_infer"}}
    (tmp_path / "out" / "vqrae" / "U").mkdir()
    status = tmp_path / "out" / "vqrae" / "U" / "status.json"
    status.write_text(json.dumps({"datasets": skipped}))
    assert vlmevalkit.failed_benchmarks(tmp_path / "out", "vqrae") == {"MMEE": "unknown"}


def test_several_images_keep_their_labels_and_share_the_tiles(
    kit: Any, asked: list[Any], llava: Path, tmp_path: Path
) -> None:
    model = vlmevalkit.model_class()(str(llava), max_new_tokens=2)
    processor = model.chat_model.processor.image_processor
    processor.max_patches = 1  # as InternVL's
    message = [{"type": "image", "value": str(tmp_path / name)} for name in ("a.png", "b.png")]
    text = {"type": "text", "value": "which <image> ?"}
    model.generate(message=[*message, text], dataset="MMMU_DEV_VAL")
    assert processor.max_patches == 12
    [[turn]] = asked
    kinds = [part.get("text") or part["image"].size for part in turn["content"]]
    assert kinds == ["Image-1: ", (20, 16), "Image-2: ", (6, 6), "which <image> ?"]
    model.generate(message=[message[1], text | {"value": "which?"}], dataset="BMMR")
    assert processor.max_patches == 6
    assert asked[1][0]["content"][0]["image"].size == (6, 6)
    with pytest.raises(NotImplementedError, match="several turns"):
        model.chat([{"role": "user", "content": "?"}], dataset="MMDU")


# Width, height, most tiles, and how many the kit's `dynamic_preprocess` makes at e8e78f05,
# thumbnail included.
TILES = [
    (1222, 155, 1, 1), (378, 296, 24, 21), (168, 518, 12, 4), (943, 734, 6, 7), (264, 1046, 18, 5),
    (78, 197, 12, 11), (605, 1335, 12, 9), (647, 663, 18, 5), (892, 284, 18, 4), (447, 500, 18, 1),
]  # fmt: skip


def test_the_processor_of_transformers_makes_as_many_tiles() -> None:
    processor = GotOcr2ImageProcessor(size={"height": 448, "width": 448}, crop_to_patches=True)
    for width, height, most, expected in TILES:
        processor.max_patches = most  # as `generate_inner` sets it
        tiles = processor(Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"]
        assert len(tiles) == expected, (width, height, most)


def test_each_process_takes_its_own_gpu(
    kit: Any, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    (tmp_path / "run.py").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "3")
    launch(tmp_path, llava)
    assert chosen == [3]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"set root to a clone of github.com/open-compass/VLMEvalKit"
    ):
        vlmevalkit.main([f"root={tmp_path}", "model=m", "output=o"])
    (tmp_path / "run.py").write_text("")
    with pytest.raises(SystemExit, match="pip install -e"):
        vlmevalkit.main([f"root={tmp_path}", "model=m", "output=o"])
