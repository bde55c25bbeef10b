"""A tiny random language model, tokenizers of one and of eight codebooks, two images to learn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqrae.common.config import load_config, shipped_config
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

NAMES = ("red circle", "blue star")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ENCODER = {**SIZES, "model_type": "siglip_vision_model", "vision_use_head": False}
ENCODER |= {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
TOKENIZERS = {
    "one": {"codebook_size": 64, "codebook_dim": 32},
    "eight": {"codebook_size": 16, "codebook_dim": 64, "num_codebooks": 8, "quantizer": "mcq"},
}
TOKENIZERS["eight"] |= {"projection": "attention", "projection_heads": 4}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of 32 pixels in 16 places, each with one code of 64, or eight of 16."""
    folders = {}
    for name, values in TOKENIZERS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        VQRAEModel(VQRAEConfig(encoder_config=ENCODER, **values)).save_pretrained(folders[name])
    return folders


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
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images: with captions, twice since a split needs several, and with questions."""
    folder = tmp_path_factory.mktemp("world")
    lines, records = [], []
    for i, name in enumerate(NAMES):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)
        image.save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"a {name}"}))
        turns = [
            {"from": "human", "value": "<image>\nwhat is it ?"},
            {"from": "gpt", "value": name},
        ]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "pairs.jsonl").write_text("\n".join(lines * 2))
    (folder / "asked.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def arguments(llm_path: Path, world: Path) -> list[str]:
    """Command line of four steps of two micro-batches, without tokenizer and output."""
    steps = ["max_steps=4", "global_batch_size=8", "micro_batch_size=4", "save_steps=2"]
    steps += ["logging_steps=1", "save_total_limit=2", "optimizer=adamw"]
    given = ["tiny", f"llm={llm_path}", "depth.num_layers=1", "previews=0"]
    given += [f"{task}.data={world / 'pairs.jsonl'}" for task in ("generation", "captioning")]
    given += [f"instructions.data={world / 'asked.json'}"]
    return [*given, *(f"optimization.{step}" for step in steps)]
