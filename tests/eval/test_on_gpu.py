"""Evaluations of a tokenizer on the GPU of tests/fake_gpu.py: no two devices meet."""

from pathlib import Path
from typing import Any

import pytest
from fake_gpu import fake_gpu

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.eval.features.evaluate import FeaturesConfig, extract, teacher_cosines
from vqrae.eval.reconstruction.evaluate import evaluate_reconstruction
from vqrae.eval.reconstruction.frechet import FrechetMetric
from vqrae.eval.reconstruction.networks import OriginalEncoder
from vqrae.eval.reconstruction.protocols import PROTOCOLS
from vqrae.tokenizer.modeling import VQRAEModel


class Labelled(SceneDataset):
    """Scenes with a class of their own."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "label": index % 2}


@pytest.mark.parametrize("protocol", ["standard", "maskbit", "vgt"])
def test_reconstructions_are_scored(protocol: str, tokenizer_folder: Path) -> None:
    model = VQRAEModel.from_pretrained(tokenizer_folder).eval()
    with fake_gpu():
        model.to("cuda")
        network = OriginalEncoder(VQRAEModel.from_pretrained(tokenizer_folder))
        metrics, images, copies = evaluate_reconstruction(
            model,
            SceneDataset("validation", 6),
            batch_size=4,
            protocol=PROTOCOLS[protocol],
            frechet=[FrechetMetric(network, "cuda")],
        )
    assert metrics["num_images"] == 1  # what the fake GPU answers
    assert {"psnr", "ssim", "frechet_encoder"} <= metrics.keys()
    assert images.shape == copies.shape == (6, 3, 64, 64)


def test_features_are_compared(tokenizer_folder: Path) -> None:
    model = VQRAEModel.from_pretrained(tokenizer_folder).eval()
    config = FeaturesConfig(model="", output="", batch_size=4)
    with fake_gpu():
        model.to("cuda")
        scenes = Labelled("validation", 6)
        cosines = teacher_cosines(model, model, scenes, config)
        samples = extract(model, scenes, config)
    assert cosines == {"teacher_cosine": 1, "teacher_cosine_other_image": 1}
    assert all(kind.features.device.type == "cuda" for kind in samples.values())
