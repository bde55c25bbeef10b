"""lmms-eval: the plug-in's contract without it, and with it every benchmark over local files."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.eval.understanding import evaluate as understanding
from vqrae.eval.understanding.benchmarks import (
    BENCHMARKS,
    FOLDER_VARIABLE,
    join_local_images,
    paper_row,
    write_task_file,
)
from vqrae.understanding.chat import Chat

# ---- the plug-in


def request(doc_id: int, **options: Any) -> types.SimpleNamespace:
    """A chat request as lmms-eval 0.7.3 makes it: six fields."""

    def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]

    arguments = ("text " * doc_id, doc_to_messages, options, doc_id, "task", "test")
    return types.SimpleNamespace(args=arguments)


class Messages:
    """What the plug-in uses of `lmms_eval.protocol.ChatMessages`."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        [self.message] = messages

    def extract_media(self) -> tuple[list, list, list]:
        kinds = [content["type"] for content in self.message["content"]]
        return kinds.count("image") * [0], kinds.count("video") * [0], []

    def to_hf_messages(self) -> list[dict[str, Any]]:
        parts = []
        for part in self.message["content"]:
            is_image = part["type"] == "image"
            parts.append({"type": "image", "image": part["url"]} if is_image else part)
        return [{**self.message, "content": parts}]


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in's class, on lmms-eval or on stand-ins of its two parts."""
    try:
        import lmms_eval.api.model
        import lmms_eval.protocol  # noqa: F401
    except ImportError:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.protocol"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        base = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        sys.modules["lmms_eval.api.model"].lmms = base  # type: ignore[attr-defined]
        sys.modules["lmms_eval.protocol"].ChatMessages = Messages  # type: ignore[attr-defined]
        monkeypatch.delitem(sys.modules, "vqrae.eval.understanding.lmms_eval_model", raising=False)
    from vqrae.eval.understanding.lmms_eval_model import LMMSEvalModel

    yield LMMSEvalModel
    sys.modules.pop("vqrae.eval.understanding.lmms_eval_model", None)


def documents() -> list[dict[str, Any]]:
    scenes = SceneDataset(item="conversation")
    images = [scenes[i]["image"] for i in range(4)]
    return [
        {"images": [images[0]], "question": "what color is the circle ?"},
        {"images": [], "question": "how many things are there ?"},
        {"images": [images[1]], "question": "is there a red star left of the blue heart ?"},
        {"images": [images[2], images[3]], "question": "what ?"},
        {"images": [images[3].resize((90, 50))], "question": "what color is the circle ?"},
    ]


def test_batches_give_the_answers_of_single_questions(model_class: Any, llava: Path) -> None:
    answers = {}
    options = [{"max_new_tokens": 3 + i % 2, "temperature": 0, "top_p": None} for i in range(5)]
    for batch_size in (1, 3, "5"):
        model = model_class(str(llava), batch_size=batch_size, device="cpu")
        model.task_dict["task"] = {"test": documents()}
        requests = [request(i, **given) for i, given in enumerate(options)]
        answers[batch_size] = model.generate_until(requests)
    assert answers[1] == answers[3] == answers["5"]
    assert len(set(answers[1])) > 2
    chat, doc = Chat.from_pretrained(llava, max_new_tokens=4), documents()[3]
    assert chat.answer([(doc["images"], doc["question"])]) == [answers[1][3]]


def test_options_of_a_task(model_class: Any, llava: Path) -> None:
    model = model_class(str(llava), device="cpu")
    model.task_dict["task"] = {"test": documents()}
    [whole] = model.generate_until([request(0, max_new_tokens=12)])
    last = whole.split()[-1]
    [cut] = model.generate_until([request(0, max_new_tokens=12, until=last)])
    assert cut == whole[: whole.index(last)].strip()
    torch.manual_seed(0)
    sampling = {"temperature": 5.0, "do_sample": True}
    assert model.generate_until([request(0, max_new_tokens=12, **sampling)]) != [whole]
    [short] = model.generate_until([request(0, max_new_tokens=2)])
    assert whole.startswith(short)
    assert len(short) < len(whole)
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])


# ---- scores


def test_the_papers_row_is_found_by_the_models_shapes() -> None:
    def row(kind: str, size: Any, width: int) -> tuple[str, dict[str, Any]]:
        vision = {"model_type": kind, "image_size": size}
        return paper_row({"vision_config": vision, "text_config": {"hidden_size": width}})

    name, scores = row("siglip_vision_model", 512, 5120)
    assert name == "paper, SigLIP2-512, Vicuna-13B"
    assert (scores["MME-P"], scores["AI2D"]) == (1543.3, 59.8)
    assert row("internvl_vision", [448, 448], 3584)[1]["GQA"] is None
    assert "another model" in paper_row({})[0]


@pytest.mark.parametrize(
    "results", [None, {"results": {}}, {"results": {"pope": {"pope_f1_score,none": float("nan")}}}]
)
def test_a_benchmark_without_a_score_has_failed(results: Any) -> None:
    with pytest.raises(ValueError, match="the benchmark failed"):
        understanding.find_score("pope", "pope", results)


def test_unknown_benchmarks_are_refused() -> None:
    config = understanding.UnderstandingConfig(model="m", output="o")
    assert config.names() == list(BENCHMARKS)
    with pytest.raises(ValueError, match="Did you mean 'pope'"):
        understanding.UnderstandingConfig(model="m", output="o", benchmark="pop")


# ---- local files


def encoded(image: Image.Image, **options: Any) -> dict[str, Any]:
    stream = io.BytesIO()
    image.save(stream, **options)
    return {"bytes": stream.getvalue(), "path": None}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the features that the real data sets have."""
    kinds: dict[str, Any] = {}
    for key, value in rows[0].items():
        kind = ImageFeature() if key.startswith("image") and key != "imageId" else Value("string")
        kind = Value("int64") if isinstance(value, int) else kind
        kinds[key] = Sequence(kind) if isinstance(value, list) else kind
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(path)


def local_benchmarks(folder: Path) -> Path:
    """Four invented documents of each benchmark, in the columns of the real data sets."""
    image = encoded(Image.new("RGB", (40, 30), "red"), format="PNG")
    plain = {"image": image, "question": "what color is it ?", "question_id": "1"}
    yes_no = plain | {"answer": "yes", "category": "existence"}
    four = {"A": "red", "B": "blue", "C": "green", "D": "black"}
    texts = list(four.values())
    choices = {f"choice_{letter.lower()}": text for letter, text in four.items()}
    labels = {"hint": "nan", "source": "s", "split": "dev", "category": "c", "L2-category": "l"}
    gqa = {"id": "1", "imageId": "n7", "question": "what ?", "answer": "red"}
    mmmu = {"id": "validation_Art_1", "question": "What is in <image 1>?", "options": str(texts)}
    mmmu |= {"question_type": "multiple-choice", "answer": "A"}
    rows: dict[str, dict[str, Any]] = {
        "pope/data/test-0": yes_no,
        "mme/test-0": yes_no,
        "gqa/testdev_balanced_instructions/a": gqa,
        "gqa/testdev_balanced_images/a": {"id": "n7", "image": image},
        "textvqa/validation-0": plain | {"answers": ["red"] * 10, "ocr_tokens": ["STOP", "ROAD"]},
        "mmbench/en/dev-0": plain | four | {"answer": "A"} | labels,
        "seedbench/test-0": plain
        | choices
        | {"image": [image], "answer": "A", "data_type": "image"},
        "mmmu/validation-0": mmmu | {"image_1": image},
        "ai2d/test-0": plain | {"options": texts, "answer": "0"},
    }
    for name, row in rows.items():
        numbered = [row | ({"index": i} if "hint" in row else {}) for i in range(4)]
        write_parquet(folder / f"{name}.parquet", numbered)
    return folder


def test_gqa_keeps_the_bytes_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    image = encoded(Image.fromarray(noise), format="JPEG", quality=95)
    file = tmp_path / "gqa" / "testdev_balanced_images" / "a.parquet"
    write_parquet(file, [{"id": "n7", "image": image}])
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    joined = join_local_images(Dataset.from_list([{"imageId": "n7", "question": "what ?"}]))
    stored = joined.cast_column("image", ImageFeature(decode=False))
    assert stored[0]["image"]["bytes"] == image["bytes"]


def test_mmbench_takes_the_english_questions_alone(tmp_path: Path) -> None:
    for language in ("cc", "cn", "en"):
        (tmp_path / "mmbench" / language).mkdir(parents=True)
        (tmp_path / "mmbench" / language / "dev-00000-of-00001.parquet").touch()
    [path] = tmp_path.glob(BENCHMARKS["mmbench"].files)
    assert path.parent.name == "en"


# ---- lmms-eval itself


@pytest.mark.slow
def test_every_benchmark_runs_over_local_files(
    llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lmms_eval")
    from vqrae.eval.understanding import lmms_eval_model

    monkeypatch.setattr(lmms_eval_model, "DEFAULT_MAX_NEW_TOKENS", 4)  # this model never ends
    # Collects garbage after every benchmark, for seconds.
    monkeypatch.setattr(lmms_eval_model.LMMSEvalModel, "clean", lambda self: None)
    data, output = local_benchmarks(tmp_path / "data"), tmp_path / "out"
    command = [f"model={llava}", f"data={data}", f"output={output}", "device=cpu", "limit=2"]
    understanding.main([*command, "batch_size=2"])
    first = capsys.readouterr().out
    assert list(json.loads((output / "scores.json").read_text())) == list(BENCHMARKS)
    with_tokens = (output / "textvqa_ocr.samples.jsonl").read_text()
    assert "STOP, ROAD" in with_tokens.split('"arguments"')[1]
    assert "Reference OCR" not in (output / "textvqa.samples.jsonl").read_text()
    written = json.loads((output / "pope.json").read_text())
    assert written["manifest"]["fingerprints"]["model"] == written["settings"]["model"]
    assert written["manifest"]["packages"]["lmms-eval"]
    assert written["num_samples"] == 2
    understanding.main(command)  # everything exists
    assert "task vqrae_pope" in first
    assert "task vqrae_pope" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"made with other settings \(limit 2 -> 1\)"):
        understanding.main([*command, "limit=1", "benchmark=pope"])


@pytest.mark.slow
def test_answers_are_those_of_the_wrapper_in_lmms_eval(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours in batches, lmms-eval's own `llava_hf` one by one, on the same folder."""
    pytest.importorskip("lmms_eval")
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from vqrae.eval.understanding.lmms_eval_model import LMMSEvalModel

    # It reads videos only.
    video = types.SimpleNamespace(VideoReader=None, cpu=None)
    monkeypatch.setitem(sys.modules, "decord", video)
    scenes = SceneDataset("validation", 2)
    rows = []
    for i in range(2):
        image = encoded(Image.fromarray(scenes.pixels(i)), format="PNG")
        for asked in scenes.questions(i):
            rows.append({"image": image, "question": asked.text, "question_id": str(len(rows))})
            rows[-1] |= {"answers": [asked.answer] * 10, "ocr_tokens": ["-"]}
    write_parquet(tmp_path / "textvqa" / "validation-0.parquet", rows)
    write_task_file("textvqa", tmp_path, tmp_path)
    with (tmp_path / "vqrae_textvqa.yaml").open("a") as task:
        task.write("generation_kwargs: {max_new_tokens: 8, do_sample: false}\n")
    places = types.SimpleNamespace(output_path=str(tmp_path), process_with_media=False)
    options = {
        "tasks": ["vqrae_textvqa"],
        "task_manager": TaskManager("WARNING", str(tmp_path), include_defaults=False),
        "device": "cpu",
        "cli_args": places,
    }
    stock = f"pretrained={llava},device_map=cpu,dtype=float32,attn_implementation=eager"
    ours = LMMSEvalModel(str(llava), batch_size=5, device="cpu")
    answers = []
    for model in ({"model": ours}, {"model": "llava_hf", "model_args": stock, "batch_size": 1}):
        result = evaluator.simple_evaluate(**model, **options)
        samples = result["samples"]["vqrae_textvqa"]
        answers.append({sample["doc_id"]: sample["resps"] for sample in samples})
    assert answers[0] == answers[1]
    assert len({str(answer) for answer in answers[0].values()}) > 5


@pytest.mark.slow
def test_what_fails_in_lmms_eval_fails_here(llava: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    command = [f"model={llava}", f"output={tmp_path / 'out'}", "device=cpu", f"data={tmp_path}"]
    with pytest.raises(FileNotFoundError, match=r"holds no pope/\*\*/test\*.parquet"):
        understanding.main([*command, "benchmark=pope"])
    (tmp_path / "pope").mkdir()
    Dataset.from_list([{"question": "no image ?"}]).to_parquet(tmp_path / "pope" / "test.parquet")
    with pytest.raises(KeyError):
        understanding.main([*command, "benchmark=pope"])
    assert not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.slow
def test_lmms_eval_finds_the_model() -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from vqrae.eval.understanding.lmms_eval_plugin import manifest

    registry = ModelRegistryV2()
    for found in manifest():
        registry.register_manifest(found)
    assert registry.get_model_class("vqrae").__name__ == "LMMSEvalModel"
    assert registry.get_model_class("vqrae_generator").__name__ == "LMMSEvalGenerator"
