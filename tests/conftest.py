"""Small models for all tests: real classes with small configurations, on one thread."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from transformers import PreTrainedModel

from vqrae.common.config import load_config, shipped_config
from vqrae.common.files import weights_fingerprint
from vqrae.tokenizer.codebook import initialize_codebook, standardize_features
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep the libraries out of garbage collections, which every training asks for: each 3 s."""
    gc.freeze()


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
    "unitok": {
        "model_type": "vitamin",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "stem_widths": [16, 16],
        "image_size": 64,
    },
}
UNITOK: dict = {
    "quantizer": "mcq",
    "num_codebooks": 4,
    "codebook_dim": 16,
    "projection": "attention",
    "projection_heads": 4,
    "decoder": "conv",
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": 24,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
"""Of a small tokenizer, next to its encoder."""


def make_tokenizer(encoder: str = "siglip", **options: object) -> VQRAEModel:
    """A random tokenizer in evaluation mode; `unitok` is the whole of UniTok's."""
    torch.manual_seed(0)
    values: dict = {"codebook_size": 64, "codebook_dim": 32}
    values |= (UNITOK if encoder == "unitok" else {}) | options
    return VQRAEModel(VQRAEConfig(encoder_config=SMALL_ENCODERS[encoder], **values)).eval()


@pytest.fixture(params=list(SMALL_ENCODERS))
def tokenizer(request: pytest.FixtureRequest) -> VQRAEModel:
    return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random 64-px tokenizer whose codebook was started from scenes."""
    from vqrae.data.scenes.dataset import SceneDataset

    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    model = make_tokenizer(feature_norm="standardize")
    scenes = SceneDataset("train", 16)
    images = torch.stack([scenes[i]["image"] for i in range(16)]).float() / 255
    standardize_features(model, images)
    initialize_codebook(model, images)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unitok_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random tokenizer of UniTok, which reads the words of scenes."""
    from vqrae.data.scenes.language import vocabulary_texts
    from vqrae.data.scenes.sprites import load_sprites
    from vqrae.data.word_tokenizer import END, build_word_tokenizer

    folder = tmp_path_factory.mktemp("unitok") / "model"
    text_tokenizer = build_word_tokenizer(vocabulary_texts(load_sprites().names), end_with=END)
    ids = {"vocab_size": len(text_tokenizer), "eos_token_id": text_tokenizer.eos_token_id}
    text_tokenizer.model_max_length = 16
    model = make_tokenizer("unitok", text_config={**UNITOK["text_config"], **ids})
    model.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with the word tokenizer."""
    from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm

    folder = tmp_path_factory.mktemp("llm")
    small = ["hidden_size=32", "num_hidden_layers=2", "intermediate_size=64", "head_dim=8"]
    overrides = [f"model.{value}" for value in small]
    path = shipped_config("vqrae.quickstart", "tiny_llm")
    torch.manual_seed(0)
    for part in build_tiny_llm(load_config(TinyLLMConfig, path, overrides)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(
    tokenizer_folder: Path, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random model that looks at its image: large weights, and no end, so that it talks on."""
    from vqrae.understanding.build import build_llava

    torch.manual_seed(0)
    model, processor = build_llava(tokenizer_folder, llm_folder)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(4)
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("llava") / "model"
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def generator(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random generator of the tokenizer's codes that knows the words of scenes."""
    from vqrae.data.scenes.language import vocabulary_texts
    from vqrae.data.scenes.sprites import load_sprites
    from vqrae.data.word_tokenizer import build_word_tokenizer
    from vqrae.generation.modeling import VisualVocabulary, build_generator

    folder = tmp_path_factory.mktemp("generator")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    vocabulary = VisualVocabulary(offset=128, codebook_size=64, num_codes=64)
    model = build_generator(vocabulary, llm_config={**sizes, **heads})
    recorded = {"prompt_template": "{caption}", "max_caption_tokens": 32, "caption_dropout": 0.1}
    recorded |= {"sampling": {"guidance_scale": 2.0}, "vqrae_tokenizer": str(tokenizer_folder)}
    recorded["vqrae_tokenizer_fingerprint"] = weights_fingerprint(tokenizer_folder)
    model.config.update(recorded)
    model.save_pretrained(folder)
    build_word_tokenizer(vocabulary_texts(load_sprites("shapes").names)).save_pretrained(folder)
    return folder


@pytest.fixture(name="make_tokenizer")
def make_tokenizer_fixture() -> Callable[..., VQRAEModel]:
    return make_tokenizer


def _flash(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """flash_attn_func (B, T, heads, D) by plain attention, with the kernel's refusal of fp32."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"FlashAttention only supports fp16 and bf16 data type, got {q.dtype}")
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(
        k.shape[2] - q.shape[2]
    )
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if causal else None, scale=softmax_scale
    )
    return output.transpose(1, 2)


def _flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """flash_attn_varlen_func (tokens, heads, D): every sequence by itself."""
    lengths_q, lengths_k = (ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k))
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    options = {"softmax_scale": softmax_scale, "causal": causal}
    return torch.cat([_flash(*(x[None] for x in part), **options)[0] for part in parts])


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a flash-attention that keeps the kernel's rule: fp16 and bf16 only.

    All of transformers' own code around the kernel runs: unpadding, borders, choice of types.
    """
    kernels = (_flash, _flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **options: kernels)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(
        PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **options: True
    )
    return "flash_attention_2"
