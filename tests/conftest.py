"""Small models for all tests: real classes with small configurations, on one thread."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from vqrae.tokenizer import VQRAEConfig, VQRAEModel

torch.set_num_threads(1)

SMALL_ENCODERS = {
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "vision_use_head": False,
    },
    "internvit": {
        "model_type": "internvl_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [56, 56],
        "patch_size": [14, 14],
    },
}


def make_tokenizer(encoder: str = "siglip", **options: object) -> VQRAEModel:
    """A random tokenizer in evaluation mode."""
    torch.manual_seed(0)
    values: dict = {"codebook_size": 64, "codebook_dim": 32, **options}
    return VQRAEModel(VQRAEConfig(encoder_config=SMALL_ENCODERS[encoder], **values)).eval()


@pytest.fixture(params=list(SMALL_ENCODERS))
def tokenizer(request: pytest.FixtureRequest) -> VQRAEModel:
    return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random 64-px tokenizer whose codebook was started from scenes."""
    from vqrae.data.scenes import SceneDataset

    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    model = make_tokenizer(feature_norm="standardize")
    scenes = SceneDataset("train", 16)
    images = torch.stack([scenes[i]["image"] for i in range(16)]).float() / 255
    model.standardize_features(images)
    model.initialize_codebook(images)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(name="make_tokenizer")
def make_tokenizer_fixture() -> Callable[..., VQRAEModel]:
    return make_tokenizer
