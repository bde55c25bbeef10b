"""Evaluations on two processes: the work is shared, and the numbers are those of one."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import launch

from vqrae.common.files import read_json
from vqrae.common.images import save_image, tensor_to_image
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.eval.features import evaluate as features
from vqrae.eval.geneval import evaluate as geneval
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.eval.sharding import run_module
from vqrae.eval.zeroshot import evaluate as zeroshot
from vqrae.quickstart import locality, scene_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images and a broken one; in batches of four one process has two, the other one."""
    scenes = SceneDataset("validation", 11)
    for i in range(11):
        image = tensor_to_image(scenes.image(i).float() / 255)
        save_image(image, tmp_path / "folder" / f"{i:02d}.png")
    (tmp_path / "folder" / "04.png").write_bytes(b"no image")
    return tmp_path / "folder"


def comparable(value: Any) -> Any:
    """Scores without what differs between launches; sums of floats depend on their order."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key != "manifest"}
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    tokenizer_folder: Path,
    unitok_folder: Path,
    llava: Path,
    generator: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes leave the processes uneven shares."""
    model, original = f"model={tokenizer_folder}", f"original_encoder={tokenizer_folder}"
    frechet = [f"data={folder}", "frechet=[encoder]", "batch_size=4"]
    few = ["num_train=30", "num_test=11", "neighbors=5", "batch_size=4"]
    images = ["per_family=2", "images_per_prompt=1", "batch_size=4"]
    commands: list[tuple[ModuleType, dict[str, int], list[str]]] = [
        (reconstruction, {}, [model, original, *frechet]),
        (features, {}, [model, original, *few]),
        (zeroshot, {}, [f"model={unitok_folder}", "num_images=11", "batch_size=4"]),
        (locality, {"PROMPTS": 2, "IMAGES": 1}, [model, "num_images=20", "batch_size=8"]),
        (scene_questions, {"CHUNK": 5}, [f"model={llava}", "num_images=3", "max_new_tokens=2"]),
        (geneval, {}, [f"model={generator}", *images]),
    ]
    printed = ""
    for module, settings, arguments in commands:
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
        file = f"{module.__name__}.json"
        module.main([*arguments, f"output={tmp_path / 'one' / file}"])
        given = [*arguments, f"output={tmp_path / 'two' / file}"]
        printed += launch(module.__name__, given, processes=2, settings=settings)
    for module, *_ in commands:
        file = f"{module.__name__}.json"
        one, both = (read_json(tmp_path / place / file) for place in ("one", "two"))
        assert both == comparable(one) | {k: v for k, v in both.items() if k == "manifest"}, file
        said = printed.count(f"->  {tmp_path / 'two' / file}")
        assert said == 1  # and written, by one of them
    first, second = (sorted((tmp_path / f / "images").rglob("*.png")) for f in ("one", "two"))
    assert len(first) == len(second) == 12
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_one_of_several_processes_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got a launch of 2 processes, expected one that starts"):
        run_module(features, [], 1)
