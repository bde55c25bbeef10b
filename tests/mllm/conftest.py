"""A tiny random language model and tokenizers of one and of several codebooks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vqrae.common.config import load_config, shipped_config
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

Run = Callable[..., Path]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ENCODER = {**SIZES, "model_type": "siglip_vision_model", "vision_use_head": False}
ENCODER |= {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
TOKENIZERS = {
    "one": {"codebook_size": 64, "codebook_dim": 32},
    "several": {"codebook_size": 16, "codebook_dim": 64, "num_codebooks": 8, "quantizer": "mcq"},
}
TOKENIZERS["several"] |= {"projection": "attention", "projection_heads": 4}


@pytest.fixture(scope="session", params=list(TOKENIZERS))
def tokenizer_path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Images of 32 pixels in 16 places, each with one code of 64, or eight of 16."""
    torch.manual_seed(0)
    config = VQRAEConfig(encoder_config=ENCODER, **TOKENIZERS[request.param])
    folder = tmp_path_factory.mktemp("tokenizer")
    VQRAEModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Qwen3 with the word tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    small = [f"model.{key}={value}" for key, value in SIZES.items()]
    small += ["model.head_dim=16", "model.num_attention_heads=2", "model.num_key_value_heads=1"]
    torch.manual_seed(0)
    config = load_config(TinyLLMConfig, shipped_config("vqrae.quickstart", "tiny_llm"), small)
    for part in build_tiny_llm(config):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def arguments(tokenizer_path: Path, llm_path: Path) -> list[str]:
    """Command line of a run of four steps of two micro-batches, without `output_dir`."""
    steps = ["max_steps=4", "global_batch_size=8", "micro_batch_size=4", "save_steps=2"]
    steps += ["logging_steps=1", "save_total_limit=2", "optimizer=adamw"]
    optimization = [f"optimization.{step}" for step in steps]
    return ["tiny", f"tokenizer={tokenizer_path}", f"llm={llm_path}", *optimization]
