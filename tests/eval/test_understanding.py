"""lmms-eval: the plug-in's contract without it; with it (in an environment that has it), every benchmark over local files."""

import io
import json
import math
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
from vqrae.eval.understanding.benchmarks import BENCHMARKS, paper_row
from vqrae.eval.understanding.lmms_tasks.gqa import FOLDER_VARIABLE, join_local_images
from vqrae.eval.understanding.lmms_tasks.scenes import (
    SceneTaskConfig,
    mean_of_known,
    process_results,
    write_task,
)
from vqrae.quickstart.scene_questions import validation_questions
from vqrae.understanding.chat import Chat

# ---- the plug-in


def request(doc_id: int, **options: Any) -> types.SimpleNamespace:
    """A chat request as lmms-eval 0.7.3 makes it: six fields."""

    def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]

    return types.SimpleNamespace(
        args=("text " * doc_id, doc_to_messages, options, doc_id, "task", "test")
    )


class Messages:
    """What the plug-in uses of `lmms_eval.protocol.ChatMessages`."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages

    def extract_media(self) -> tuple[list, list, list]:
        kinds = [content["type"] for message in self.messages for content in message["content"]]
        return kinds.count("image") * [0], kinds.count("video") * [0], []

    def to_hf_messages(self) -> list[dict[str, Any]]:
        def part(content: dict[str, Any]) -> dict[str, Any]:
            return (
                {"type": "image", "image": content["url"]}
                if content["type"] == "image"
                else content
            )

        return [
            {**message, "content": [part(content) for content in message["content"]]}
            for message in self.messages
        ]


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
    for batch_size in (1, 3, "5"):
        model = model_class(str(llava), batch_size=batch_size, device="cpu")
        model.task_dict["task"] = {"test": documents()}
        requests = [
            request(i, max_new_tokens=3 + i % 2, temperature=0, top_p=None) for i in range(5)
        ]
        answers[batch_size] = model.generate_until(requests)
    assert answers[1] == answers[3] == answers["5"]
    assert len(set(answers[1])) > 2
    chat = Chat.from_pretrained(llava, max_new_tokens=4)
    doc = documents()[3]
    assert chat.answer([(doc["images"], doc["question"])]) == [answers[1][3]]


def test_options_of_a_task(model_class: Any, llava: Path) -> None:
    model = model_class(str(llava), device="cpu")
    model.task_dict["task"] = {"test": documents()}
    [whole] = model.generate_until([request(0, max_new_tokens=12)])
    last = whole.split()[-1]
    [cut] = model.generate_until([request(0, max_new_tokens=12, until=last)])
    assert cut == whole[: whole.index(last)].strip()
    torch.manual_seed(0)
    assert model.generate_until(
        [request(0, max_new_tokens=12, temperature=5.0, do_sample=True)]
    ) != [whole]
    [short] = model.generate_until([request(0, max_new_tokens=2)])
    assert whole.startswith(short)
    assert len(short) < len(whole)
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])


# ---- scenes


def test_scene_task_asks_what_our_own_evaluation_asks(tmp_path: Path) -> None:
    folder = write_task(SceneTaskConfig(output=str(tmp_path), num_images=4))
    rows = Dataset.from_parquet(str(folder / "scenes.parquet"), cache_dir=str(tmp_path / "cache"))
    asked = validation_questions(SceneDataset("validation", 4), 4)
    assert [(row["question"], row["answer"], row["held_out"]) for row in rows] == [
        (item.question.text, item.question.answer, item.held_out) for item in asked
    ]
    assert rows[0]["image"].tobytes() == SceneDataset("validation", 4).pixels(0).tobytes()
    assert process_results(rows[0], [f" {rows[0]['answer'].upper()}\n"]) == {
        "accuracy": 1.0,
        "held_out": None,
        "seen": 1.0,
    }
    assert mean_of_known([1.0, None, 0.0]) == 0.5
    assert math.isnan(mean_of_known([None]))


# ---- scores


def test_the_papers_row_is_found_by_the_models_shapes() -> None:
    config = {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 512},
        "text_config": {"hidden_size": 5120},
    }
    name, scores = paper_row(config)
    assert (name, scores["MME-P"], scores["AI2D"]) == (
        "paper, SigLIP2-512, Vicuna-13B",
        1543.3,
        59.8,
    )
    config = {
        "vision_config": {"model_type": "internvl_vision", "image_size": [448, 448]},
        "text_config": {"hidden_size": 3584},
    }
    assert paper_row(config)[1]["GQA"] is None
    assert "another model" in paper_row({})[0]


@pytest.mark.parametrize(
    "results", [None, {"results": {}}, {"results": {"pope": {"pope_f1_score,none": float("nan")}}}]
)
def test_a_benchmark_without_a_score_has_failed(results: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the benchmark has failed"):
        understanding._store(tmp_path / "pope.json", "pope", "pope", results, {})
    assert not (tmp_path / "pope.json").exists()


def test_both_textvqa_columns_are_named() -> None:
    found = {name: {"score": 50.0} for name in ("textvqa", "textvqa_ocr", "mme")}
    text = understanding.markdown(found, {}, None)
    assert "| TextVQA (no OCR tokens) | TextVQA (OCR tokens) | MME-Perception |" in text
    assert "| ours | 50.0 | 50.0 | 50.0 |" in text
    assert "does not say whether" in text


def test_unknown_benchmarks_are_refused() -> None:
    assert understanding.UnderstandingConfig(
        model="m", output="o", benchmark="paper"
    ).names() == list(BENCHMARKS)
    with pytest.raises(ValueError, match="Did you mean 'pope'"):
        understanding.UnderstandingConfig(model="m", output="o", benchmark="pop")


# ---- lmms-eval itself


def local_benchmarks(folder: Path) -> Path:
    """Four invented documents of each benchmark, in the columns of the real data sets."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(stream, format="PNG")
    image = {"bytes": stream.getvalue(), "path": None}
    plain = {"image": image, "question": "what color is it ?", "question_id": "1"}
    yes_no = plain | {"answer": "yes", "category": "existence"}
    four = {"A": "red", "B": "blue", "C": "green", "D": "black"}
    choices = {f"choice_{letter.lower()}": text for letter, text in four.items()}
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "pope": ("pope/data/test-0.parquet", yes_no),
        "mme": ("mme/test-0.parquet", yes_no),
        "gqa": (
            "gqa/testdev_balanced_instructions/a.parquet",
            {"id": "1", "imageId": "n7", "question": "what ?", "answer": "red"},
        ),
        "gqa_images": ("gqa/testdev_balanced_images/a.parquet", {"id": "n7", "image": image}),
        "textvqa": (
            "textvqa/validation-0.parquet",
            plain | {"answers": ["red"] * 10, "ocr_tokens": ["STOP", "ROAD"]},
        ),
        "mmbench": (
            "mmbench/en/dev-0.parquet",
            plain
            | four
            | {
                "answer": "A",
                "hint": "nan",
                "source": "s",
                "split": "dev",
                "category": "c",
                "L2-category": "l",
            },
        ),
        "seedbench": (
            "seedbench/test-0.parquet",
            plain | choices | {"image": [image], "answer": "A", "data_type": "image"},
        ),
        "mmmu": (
            "mmmu/validation-0.parquet",
            {
                "id": "validation_Art_1",
                "question": "What is in <image 1>?",
                "options": str(list(four.values())),
                "question_type": "multiple-choice",
                "answer": "A",
                "image_1": image,
            },
        ),
        "ai2d": ("ai2d/test-0.parquet", plain | {"options": list(four.values()), "answer": "0"}),
    }
    for name, row in rows.values():
        kinds = {
            key: Sequence(Value("string")) if isinstance(value, list) else Value("string")
            for key, value in row.items()
        }
        kinds |= {key: ImageFeature() for key in ("image", "image_1") if key in row}
        if "choice_a" in row:
            kinds["image"] = Sequence(ImageFeature())
        documents = [dict(row) for _ in range(4)]
        if "L2-category" in row:
            kinds["index"] = Value("int64")
            documents = [document | {"index": i} for i, document in enumerate(documents)]
        path = folder / name
        path.parent.mkdir(parents=True)
        Dataset.from_list(documents, features=Features(kinds)).to_parquet(path)
    return folder


def test_gqa_keeps_the_bytes_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, format="JPEG", quality=95)
    image = {"bytes": stream.getvalue(), "path": None}
    kinds = Features({"id": Value("string"), "image": ImageFeature()})
    (tmp_path / "gqa" / "testdev_balanced_images").mkdir(parents=True)
    images = Dataset.from_list([{"id": "n7", "image": image}], features=kinds)
    images.to_parquet(tmp_path / "gqa" / "testdev_balanced_images" / "a.parquet")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    joined = join_local_images(Dataset.from_list([{"imageId": "n7", "question": "what ?"}]))
    assert np.array_equal(np.asarray(joined[0]["image"]), np.asarray(Image.open(stream)))
    assert (
        joined.cast_column("image", ImageFeature(decode=False))[0]["image"]["bytes"]
        == stream.getvalue()
    )


def test_mmbench_takes_the_english_questions_alone(tmp_path: Path) -> None:
    for language in ("cc", "cn", "en"):
        (tmp_path / "mmbench" / language).mkdir(parents=True)
        (tmp_path / "mmbench" / language / "dev-00000-of-00001.parquet").touch()
    [path] = tmp_path.glob(BENCHMARKS["mmbench"].files)
    assert path.parent.name == "en"


@pytest.mark.slow
def test_every_benchmark_runs_over_local_files(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lmms_eval")
    data = local_benchmarks(tmp_path / "data")
    names = ",".join(["scenes", *BENCHMARKS])
    command = [
        f"model={llava}",
        f"data={data}",
        f"output={tmp_path / 'out'}",
        "num_images=2",
        "device=cpu",
        "limit=2",
    ]
    understanding.main([*command, f"benchmark={names}", "batch_size=2"])
    first = capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(scores) == ["scenes", *BENCHMARKS]
    with_tokens, without = (
        (tmp_path / "out" / f"{name}.samples.jsonl").read_text()
        for name in ("textvqa_ocr", "textvqa")
    )
    assert "STOP, ROAD" in with_tokens.split('"arguments"')[1]
    assert "Reference OCR" not in without
    written = json.loads((tmp_path / "out" / "pope.json").read_text())
    assert written["manifest"]["fingerprints"]["model"] == written["settings"]["model"]
    assert written["manifest"]["packages"]["lmms-eval"]
    assert written["num_samples"] == 2
    understanding.main([*command, f"benchmark={names}"])  # everything is there
    assert "task vqrae_pope" in first
    assert "task vqrae_pope" not in capsys.readouterr().out
    understanding.main(
        [*command[:-1], "limit=1", "benchmark=pope"]
    )  # another limit is another score
    assert json.loads((tmp_path / "out" / "pope.json").read_text())["num_samples"] == 1


@pytest.mark.slow
def test_answers_are_those_of_the_wrapper_in_lmms_eval(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours in batches, lmms-eval's own `llava_hf` one by one, on the same folder."""
    pytest.importorskip("lmms_eval")
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from vqrae.eval.understanding.lmms_eval_model import LMMSEvalModel

    monkeypatch.setitem(
        sys.modules, "decord", types.SimpleNamespace(VideoReader=None, cpu=None)
    )  # it reads videos only
    tasks = TaskManager(
        "WARNING",
        str(write_task(SceneTaskConfig(output=str(tmp_path), num_images=2))),
        include_defaults=False,
    )
    places = types.SimpleNamespace(output_path=str(tmp_path), process_with_media=False)
    options = {
        "tasks": ["vqrae_scenes"],
        "task_manager": tasks,
        "device": "cpu",
        "cli_args": places,
    }
    stock = f"pretrained={llava},device_map=cpu,dtype=float32,attn_implementation=eager"
    results = [
        evaluator.simple_evaluate(
            model=LMMSEvalModel(str(llava), batch_size=5, device="cpu"), **options
        ),
        evaluator.simple_evaluate(model="llava_hf", model_args=stock, batch_size=1, **options),
    ]
    ours, theirs = (
        {sample["doc_id"]: sample["resps"] for sample in result["samples"]["vqrae_scenes"]}
        for result in results
    )
    assert ours == theirs
    assert len({str(answer) for answer in ours.values()}) == len(ours) > 5


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
    registry.register_manifest(manifest())
    assert registry.get_model_class("vqrae").__name__ == "LMMSEvalModel"
