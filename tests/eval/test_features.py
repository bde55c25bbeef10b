"""Probes against problems whose answer is known, labels of scenes and folders, and the command."""

import json
from pathlib import Path

import pytest
import torch

from vqrae.common.images import save_image, tensor_to_image
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.scene import SceneObject
from vqrae.eval.features import evaluate as features
from vqrae.eval.features.evaluate import FeaturesConfig, extract, teacher_cosines
from vqrae.eval.features.labelled import LabelledScenes, cell_labels, folder_tasks, scene_tasks
from vqrae.eval.features.probes import (
    LabelledFeatures,
    knn_accuracy,
    linear_accuracy,
    majority_share,
)
from vqrae.tokenizer.modeling import VQRAEModel


def clusters(count: int, seed: int, noise: float = 0.1) -> LabelledFeatures:
    """Three classes around three directions in eight dimensions, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centers = torch.eye(8)[:3] * 3
    features = centers[labels] + noise * torch.randn(count, 8, generator=generator) + 1
    return LabelledFeatures(features, labels)


def noise(seed: int) -> LabelledFeatures:
    features = torch.randn(600, 8, generator=torch.Generator().manual_seed(seed))
    return LabelledFeatures(features, torch.arange(600) % 3)


def test_probes_tell_clusters_apart_and_know_nothing_of_noise() -> None:
    known, asked = clusters(120, seed=0), clusters(60, seed=1)
    assert knn_accuracy(known, asked, k=5) == 1
    assert linear_accuracy(known, asked) == 1
    assert linear_accuracy(noise(2), noise(3)) == pytest.approx(1 / 3, abs=0.08)
    assert knn_accuracy(noise(2), noise(3)) == pytest.approx(1 / 3, abs=0.08)
    assert majority_share(noise(3)) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least k = 20"):
        knn_accuracy(clusters(10, seed=0), clusters(5, seed=1))


def test_the_ridge_is_chosen_on_samples_that_were_not_fitted() -> None:
    """More features than samples: a tiny ridge fits everything; held-out samples show its fault."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    signal = torch.eye(3)[labels].repeat(1, 20) + torch.randn(90, 60, generator=generator)
    wide = torch.cat([signal, 0.3 * torch.randn(90, 200, generator=generator)], dim=1)
    known = LabelledFeatures(wide[:60], labels[:60])
    assert linear_accuracy(known, LabelledFeatures(wide[60:], labels[60:])) > 0.8


# ---- labels


def name_of(item: SceneObject) -> int:
    return item.name


def test_cells_are_labelled_by_the_object_in_them() -> None:
    scenes = SceneDataset("validation", 20)
    for i in range(20):
        scene = scenes.scene(i)
        labels = cell_labels(scene, 8, 64, name_of)
        cells = [round((item.size + 4) / 8) ** 2 for item in scene.objects]
        assert int((labels >= 0).sum()) == sum(cells)
        for item in scene.objects:
            assert labels[int(item.center[1] // 8), int(item.center[0] // 8)] == item.name


def test_places_are_fields_of_a_board() -> None:
    known, _ = scene_tasks("shapes", 64, 8, 20, 1)["places"]
    for i in range(20):
        labels = known[i]["label"].view(8, 8)
        for item in known.scenes.scene(i).objects:  # type: ignore[attr-defined]
            x, y = (int(5 * c / 64) for c in item.center)
            assert labels[int(item.center[1] // 8), int(item.center[0] // 8)] == 5 * y + x


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Dark and light images in two folders."""
    folder = tmp_path / "classes"
    for name, level in {"dark": 0.2, "light": 0.8}.items():
        for i in range(20):
            noise = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(i))
            save_image(tensor_to_image(level + 0.1 * noise), folder / name / f"{i}.png")
    return folder


def test_folders_of_classes(classes: Path, tmp_path: Path) -> None:
    known, asked = folder_tasks(str(classes), None, 64, 1000, 1000)["images"]
    assert (len(known), len(asked)) == (32, 8)  # type: ignore[arg-type]
    assert asked[0]["image"].shape == (3, 64, 64)
    assert sorted(int(asked[i]["label"]) for i in range(8)) == [0] * 4 + [1] * 4
    _, same = folder_tasks(str(classes), str(classes), 64, 10, 1000)["images"]
    assert len(same) == 40  # type: ignore[arg-type]
    save_image(tensor_to_image(torch.rand(3, 8, 8)), tmp_path / "other" / "grey" / "1.png")
    with pytest.raises(ValueError, match=r"classes that .* does not: grey"):
        folder_tasks(str(classes), str(tmp_path / "other"), 64, 10, 10)
    with pytest.raises(ValueError, match="the class grey only"):
        folder_tasks(str(tmp_path / "other"), None, 64, 10, 10)
    with pytest.raises(ValueError, match="is in no class"):
        folder_tasks(str(tmp_path / "other" / "grey"), None, 64, 10, 10)


# ---- features


def test_quantized_features_are_the_vectors_of_the_codes(tokenizer_folder: Path) -> None:
    model = VQRAEModel.from_pretrained(tokenizer_folder).eval()
    lone = LabelledScenes(SceneDataset("train"), 3, None, name_of)
    found = extract(model, lone, FeaturesConfig(model="m", output="o", batch_size=2))
    image = lone[2]["image"][None].float() / 255
    expected = model.code_vectors()[model.encode(image)].mean(1)
    torch.testing.assert_close(found["quantized"].features[2:], expected)
    continuous = model.encode_features(image).mean(1)
    torch.testing.assert_close(found["continuous"].features[2:], continuous)


def test_an_image_is_never_its_own_other(tokenizer: VQRAEModel) -> None:
    size = tokenizer.config.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 3, size, size), dtype=torch.uint8, generator=generator)
    samples = [{"image": image, "label": 0} for image in images]
    for count in (5, 2, 1):
        config = FeaturesConfig(model="unused", output="unused", batch_size=count)
        cosines = teacher_cosines(tokenizer, tokenizer, samples, config)  # type: ignore[arg-type]
        assert cosines["teacher_cosine"] == pytest.approx(1)
        other = cosines["teacher_cosine_other_image"]
        if count == 5:
            expected = other
            assert other < 0.999  # type: ignore[operator]
        assert other == pytest.approx(expected)


# ---- the command


def score(output: Path, *arguments: str) -> dict:
    features.main([*arguments, f"output={output}"])
    return json.loads(output.read_text())


def test_every_stage_of_a_run_is_probed_once(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("stage1", "stage2"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "model").symlink_to(tokenizer_folder)
    output = tmp_path / "features.json"
    arguments = [f"model={tmp_path / 'run'}", "num_train=24", "num_test=8", "neighbors=5"]
    values = score(output, *arguments)
    assert list(values["stages"]) == ["stage1", "stage2"]
    stage = values["stages"]["stage2"]
    assert stage["teacher_cosine"] == pytest.approx(1, abs=1e-6)
    assert stage["teacher_cosine_other_image"] < 1
    assert set(stage["tasks"]) == {"cells", "places", "images"}
    assert 0 <= stage["tasks"]["cells"]["quantized"]["linear"] <= 1
    assert "| stage2 | quantized |" in output.with_suffix(".md").read_text()
    monkeypatch.setattr(features, "evaluate_features", None)
    assert score(output, *arguments) == values


def test_one_image_has_no_other(tokenizer_folder: Path, tmp_path: Path) -> None:
    arguments = [f"model={tokenizer_folder}", f"original_encoder={tokenizer_folder}"]
    few = ["num_train=24", "num_test=1", "neighbors=5"]
    values = score(tmp_path / "features.json", *arguments, *few)
    assert values["stages"]["model"]["teacher_cosine"] == pytest.approx(1, abs=1e-6)
    assert values["stages"]["model"]["teacher_cosine_other_image"] is None
    assert "one test image" in values["not_measured"]["teacher_cosine_other_image"]
    assert "| 1.0000 (—) |" in (tmp_path / "features.md").read_text()


def test_a_lone_tokenizer_is_probed_without_its_teacher(
    tokenizer_folder: Path, classes: Path, tmp_path: Path
) -> None:
    arguments = [f"model={tokenizer_folder}", f"data={classes}"]
    values = score(tmp_path / "features.json", *arguments, "neighbors=3")
    assert "original_encoder=" in values["not_measured"]["teacher_cosine"]
    scores = values["stages"]["model"]["tasks"]["images"]
    assert scores["continuous"]["linear"] == 1  # brightness survives even a random encoder
    assert scores["chance"] == 0.5
    with pytest.raises(ValueError, match="got 4 images to learn from, expected at least neigh"):
        score(tmp_path / "few.json", *arguments, "num_train=4")
