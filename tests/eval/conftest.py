"""Models that several evaluations are tested with."""

from pathlib import Path

import pytest
import torch

from vqrae.common.config import load_config, shipped_config
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm
from vqrae.understanding.build import build_llava


@pytest.fixture(scope="session")
def llava(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that looks at its image: large weights."""
    folder = tmp_path_factory.mktemp("llava")
    small = [
        f"model.{key}"
        for key in ("hidden_size=32", "num_hidden_layers=2", "intermediate_size=64", "head_dim=8")
    ]
    torch.manual_seed(0)
    llm, text_tokenizer = build_tiny_llm(
        load_config(TinyLLMConfig, shipped_config("vqrae.quickstart", "tiny_llm"), small)
    )
    for part in (llm, text_tokenizer):
        part.save_pretrained(folder / "llm")
    model, processor = build_llava(tokenizer_folder, folder / "llm")
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(4)
    model.generation_config.eos_token_id = None
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    return folder / "model"
