"""Image generation in lmms-eval: its own tasks over local files, with the judge on this machine."""

import io
import json
import types
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from vqrae.data.scenes.dataset import SceneDataset

pytestmark = pytest.mark.slow
evaluator = pytest.importorskip("lmms_eval.evaluator")


def local_task(folder: Path, source: str, split: str, file: Path) -> Any:
    """Scores of one of lmms-eval's own tasks over a local file, by a model."""
    import lmms_eval
    from lmms_eval.tasks import TaskManager

    tasks = Path(str(lmms_eval.__file__)).parent / "tasks"
    kind = "generate_visual_cot" if "cot" in source else "generate_until"
    lines = [f"include: {tasks / source}", "task: local", f"output_type: {kind}"]
    lines += ["dataset_path: parquet", "dataset_name: null", f"test_split: {split}"]
    lines += [f"dataset_kwargs: {{data_files: {{{split}: {file}}}}}"]
    (folder / "local.yaml").write_text("\n".join(lines) + "\n")

    def run(model: Any) -> dict[str, Any]:
        places = types.SimpleNamespace(output_path=str(folder), process_with_media=False)
        manager = TaskManager("WARNING", str(folder), include_defaults=False)
        return evaluator.simple_evaluate(
            model=model, tasks=["local"], task_manager=manager, cli_args=places
        )

    return run


def test_wise_judges_the_images_that_were_generated(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqrae.eval.understanding.lmms_eval_generator import LMMSEvalGenerator

    monkeypatch.setattr(LMMSEvalGenerator, "clean", lambda self: None)
    text = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
    server = Server((200, {"choices": [{"message": {"content": text, "role": "assistant"}}]}))
    settings = {"API_KEY": "k", "BASE_URL": server.url, "CALL_DELAY": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WISE_{name}", value)
    prompts = ["a red star", "a blue heart", "a green ring"]
    rows = [{"Prompt": p, "prompt_id": 400 + i, "Explanation": ""} for i, p in enumerate(prompts)]
    Dataset.from_list(rows).to_parquet(tmp_path / "wise.parquet")
    run = local_task(tmp_path, "WISE/WISE.yaml", "test", tmp_path / "wise.parquet")
    images = tmp_path / "images"
    options: dict[str, Any] = {"images": str(images), "batch_size": 2, "device": "cpu"}
    results = run(LMMSEvalGenerator(str(generator), **options))
    scores = results["results"]["local"]
    assert scores["WISE_overall_wiscore,none"] == pytest.approx(0.7 + 0.1)
    files = sorted((images / "local").glob("*.png"))
    assert [file.name.split("-")[0] for file in files] == ["0", "1", "2"]
    assert len({file.read_bytes() for file in files}) == 3
    said = json.loads(results["samples"]["local"][0]["resps"][0][0])
    assert said == {"text": "", "images": [str(files[0].resolve())]}
    assert len(server.received) == 3
    changed = [file.stat().st_mtime_ns for file in files]
    run(LMMSEvalGenerator(str(generator), **options))
    assert [file.stat().st_mtime_ns for file in files] == changed


def test_unig2u_shows_the_generated_image_with_its_own(
    generator: Path, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqrae.eval.understanding.lmms_eval_generator import LMMSEvalGenerator, two_stages

    monkeypatch.setattr(LMMSEvalGenerator, "clean", lambda self: None)
    scene = Image.fromarray(SceneDataset("validation", 1).pixels(0))
    stream = io.BytesIO()
    scene.save(stream, format="PNG")
    row = {"image": {"bytes": stream.getvalue(), "path": None}, "question": "how many things ?"}
    rows = [row | {"answer": "two", "type": kind} for kind in ("human_test", "augmented_test")]
    kinds: dict[str, Any] = dict.fromkeys(("question", "answer", "type"), Value("string"))
    kinds["image"] = ImageFeature()
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(tmp_path / "chart.parquet")
    source = "unig2u/chartqa100/chartqa100_visual_cot.yaml"
    run = local_task(tmp_path, source, "train", tmp_path / "chart.parquet")
    options: dict[str, Any] = {"images": str(tmp_path / "images"), "batch_size": 2, "device": "cpu"}
    with pytest.raises(ValueError, match="expected pretrained= as well"):
        LMMSEvalGenerator(str(generator), **options).generate_visual_cot([])
    model = LMMSEvalGenerator(str(generator), str(llava), **options)
    asked: list[Any] = []
    real = model.chat.generate  # type: ignore[union-attr]

    def generate(chats: Any, **given: Any) -> list[str]:
        asked.extend(chats)
        assert len(real(chats, **given)) == len(chats)
        return ["two"] * len(chats)

    monkeypatch.setattr(model.chat, "generate", generate)
    scores = run(model)["results"]["local"]
    assert scores["relaxed_overall,none"] == scores["relaxed_human_split,none"] == 1
    own, made, text = asked[0][0]["content"]
    assert own["image"].tobytes() == scene.tobytes()
    assert made["image"].size == (64, 64)
    assert "how many things ?" in text["text"]
    assert "GEN_PROMPT" not in text["text"]
    tagged = "[GEN_PROMPT]draw {question}[/GEN_PROMPT][QUESTION]<image> q ?[/QUESTION]"
    assert two_stages(tagged) == ("draw q ?", "q ?")
    assert two_stages("<image> all of it") == ("all of it", "all of it")
