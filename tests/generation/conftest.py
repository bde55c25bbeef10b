"""A tiny random visual tokenizer, a code set made with it, and a tiny random generator."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from vqrae.generation import extract_codes
from vqrae.generation.modeling import VisualVocabulary, build_generator
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

LLM_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def make_tokenizer(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    encoder = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
    }
    VQRAEModel(
        VQRAEConfig(encoder_config=encoder, codebook_size=64, codebook_dim=32)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), seed=0)


@pytest.fixture(scope="session")
def other_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("other_tokenizer"), seed=1)


@pytest.fixture(scope="session")
def codes_path(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "set"
    extract_codes.main(
        [
            "tiny",
            f"tokenizer={tokenizer_path}",
            "size=20",
            "shard_size=8",
            "captions_per_image=3",
            f"output_dir={folder}",
        ]
    )
    return folder


@pytest.fixture(scope="session")
def train_arguments(tokenizer_path: Path, codes_path: Path) -> list[str]:
    """Command line of a run of a few steps, without `output_dir`."""
    model = [f"model.llm_config.{key}={value}" for key, value in LLM_CONFIG.items()]
    optimization = {
        "max_steps": 4,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
    }
    steps = [f"optimization.{key}={value}" for key, value in optimization.items()]
    return ["tiny", f"tokenizer={tokenizer_path}", f"data={codes_path}", *model, *steps]


@pytest.fixture(scope="session")
def vocabulary() -> VisualVocabulary:
    return VisualVocabulary(offset=100, codebook_size=64, num_codes=16)


@pytest.fixture
def model(vocabulary: VisualVocabulary) -> Qwen3ForCausalLM:
    """A random generator whose logits differ enough to be told apart."""
    torch.manual_seed(0)
    model = build_generator(vocabulary, llm_config={**LLM_CONFIG, "initializer_range": 0.3}).eval()
    model.config.caption_dropout = 0.1
    return model
