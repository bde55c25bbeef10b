"""A tiny random visual tokenizer, a code set made with it, and a tiny random generator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import init
from transformers import PreTrainedModel

from vqrae.generation import extract_codes
from vqrae.generation.modeling import VisualVocabulary, build_generator
from vqrae.generation.multi_code import MultiCodeConfig, MultiCodeModel
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}
LLM = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}
ENCODER = {**SIZES, "model_type": "siglip_vision_model", "vision_use_head": False}
PROJECTION = {"kind": "attention", "code_dim": 4, "in_dim": 16, "out_dim": 32, "num_heads": 4}
ENCODER |= {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="session")
def num_codebooks(request: pytest.FixtureRequest) -> int:
    """Codes of a position: one, but in the second turn of tests marked `BOTH_SYSTEMS`."""
    return getattr(request, "param", None) or 1


@pytest.fixture(scope="session")
def tokenizers(num_codebooks: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tokenizers with different weights: 16 positions of codes out of 64."""
    sizes: dict[str, Any] = {"codebook_size": 64, "codebook_dim": 32}
    if num_codebooks > 1:
        sizes |= {"quantizer": "mcq", "num_codebooks": num_codebooks}
        sizes |= {"projection": "attention", "projection_heads": 4, "codebook_dim": 16}
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        folders.append(tmp_path_factory.mktemp("tokenizer"))
        VQRAEModel(VQRAEConfig(encoder_config=ENCODER, **sizes)).save_pretrained(folders[-1])
    return folders[0], folders[1]


@pytest.fixture(scope="session")
def tokenizer_path(tokenizers: tuple[Path, Path]) -> Path:
    return tokenizers[0]


@pytest.fixture(scope="session")
def other_tokenizer_path(tokenizers: tuple[Path, Path]) -> Path:
    return tokenizers[1]


@pytest.fixture(scope="session")
def extraction(tokenizer_path: Path) -> list[str]:
    """Command line of the extraction of 20 scenes, without `output_dir`."""
    return ["tiny", f"tokenizer={tokenizer_path}", "size=20", "shard_size=8"]


@pytest.fixture(scope="session")
def codes_path(extraction: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "set"
    extract_codes.main([*extraction, "captions_per_image=3", f"output_dir={folder}"])
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 12 captioned images of various shapes."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (36 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"a zebra and {i} unicorns"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def train_arguments(tokenizer_path: Path, codes_path: Path) -> list[str]:
    """Command line of a run of four steps, without `output_dir`."""
    model = [f"model.llm_config.{key}={value}" for key, value in LLM.items()]
    steps = ["max_steps=4", "global_batch_size=8", "micro_batch_size=4", "save_steps=2"]
    steps += ["logging_steps=1", "save_total_limit=2"]
    optimization = [f"optimization.{step}" for step in steps]
    model.append("previews=0")
    return ["tiny", f"tokenizer={tokenizer_path}", f"data={codes_path}", *model, *optimization]


@pytest.fixture
def vocabulary(num_codebooks: int) -> VisualVocabulary:
    count = 16 if num_codebooks == 1 else 5  # of n codes each, one after the other
    sizes = {"codebook_size": 64, "num_codes": count, "num_codebooks": num_codebooks}
    return VisualVocabulary(offset=100, **sizes)


@pytest.fixture
def model(vocabulary: VisualVocabulary) -> PreTrainedModel:
    """A random generator whose logits differ enough to be told apart."""
    torch.manual_seed(0)
    config = {**LLM, "initializer_range": 0.3}
    if vocabulary.num_codebooks == 1:
        model = build_generator(vocabulary, llm_config=config)
    else:
        model = MultiCodeModel._from_config(
            MultiCodeConfig(
                llm_config={**config, "model_type": "qwen3", "vocab_size": vocabulary.num_rows},
                num_codebooks=vocabulary.num_codebooks,
                codebook_size=vocabulary.codebook_size,
                projection=PROJECTION,
                head={"num_layers": 2},
            ),
            attn_implementation="sdpa",
        )
        init.normal_(model.embedding.code_vectors)
    model.config.caption_dropout = 0.1
    return model.eval()
