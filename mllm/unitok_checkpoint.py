"""UniTok's published language model, FoundationVision/unitok_mllm, as a unified model.

    vqrae import-unitok unitok_mllm runs/unitok_mllm --tokenizer runs/unitok

The map of names covers everything that the public class has; the published file itself could not be
had, so this is tested on weights of that class with random numbers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig
from transformers.initialization import no_init_weights

from vqrae.common.checkpoints import local_model, require_kind
from vqrae.common.config import load_config, shipped_config
from vqrae.common.files import atomic_path, weights_fingerprint
from vqrae.generation.own_tokenizer import record_tokenizer
from vqrae.mllm.build import build_processor, unified_config
from vqrae.mllm.config import MLLMConfig
from vqrae.mllm.modeling import UnifiedModel
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.open_clip import rename
from vqrae.tokenizer.unitok_checkpoint import PROJECTION_KEYS, load_converted

EMBEDDER = "model.multi_embedder."
KEYS = (
    (r"^model\.multi_embedder\.mm_projector\.", "embedding.mlp."),
    (r"^ar_head\.(layers|norm)\.", r"head.decoder.\1."),
    (r"^ar_head\.linear_head\.", "head.classifier."),
    (r"^(model|lm_head)\.", r"llm.\1."),
)
# Without effect: statistics, and the zeros in place of the keys' biases.
DROPPED = re.compile(r".*\.(vocab_usage|zero_k_bias)")
TABLE = re.compile(
    r"(model\.multi_embedder\.quantizer|ar_head)\.codebooks\.(\d+)\.(codebook\.)?weight"
)
# Fields of the published config.json that are Llama's; LlamaConfig folds the last two into one.
LLAMA_FIELDS = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}


def import_mllm(name: str | Path, out: str | Path, tokenizer: str | Path) -> UnifiedModel:
    """Write the model folder of the published language model.

    Args:
        name: its folder or hub id.
        tokenizer: the folder of UniTok's imported tokenizer.

    Raises:
        ValueError: for another kind of model, for tensors that are unknown, missing, of another
            shape or not finite, and for the codebooks of another tokenizer.
        FileExistsError: when `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: give another folder")
    folder, visual = local_model(name), local_model(tokenizer)
    values = require_kind(folder, ("mini_gemini",), "UniTok's published language model")
    given = [f"tokenizer={tokenizer}", f"output_dir={out}"]
    config = load_config(MLLMConfig, shipped_config("vqrae.mllm", "unitok_mllm"), given)
    encoder = VQRAEModel.from_pretrained(visual)
    processor = build_processor(
        encoder.config,
        AutoTokenizer.from_pretrained(folder),
        config.image_tokens,
        chat_template=config.chat_template,
        aspect_ratio=config.aspect_ratio,
    )
    llama = LlamaConfig(**{key: value for key, value in values.items() if key in LLAMA_FIELDS})
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    dtype = getattr(torch, values.get("torch_dtype", "float32"))
    with no_init_weights():  # all of them are loaded
        described = unified_config(config, encoder, processor, llama)
        model = UnifiedModel._from_config(described, dtype=dtype)
    load_converted(model, convert_published(state), str(folder), "eval/liquid/model")
    vectors = model.embedding.code_vectors.float()
    if not torch.allclose(vectors, encoder.code_vectors(), atol=0.01):  # bfloat16
        raise ValueError(
            f"{folder} has other codebooks than the tokenizer {tokenizer}: give the one that it "
            "was trained with"
        )
    record_tokenizer(model.config, tokenizer, weights_fingerprint(visual), out)
    with atomic_path(out) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return model


def convert_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names; unknown ones keep theirs."""
    converted: dict[str, Tensor] = {}
    tables: dict[str, dict[int, Tensor]] = {}
    projection = f"{EMBEDDER}attn_projection."
    for key, tensor in state.items():
        if DROPPED.fullmatch(key):
            continue
        if match := TABLE.fullmatch(key):
            tables.setdefault(match[1], {})[int(match[2])] = tensor
        elif key.startswith(projection):
            ours = rename(key.removeprefix(projection), PROJECTION_KEYS)
            converted[f"embedding.projection.{ours}"] = tensor
        else:
            converted[rename(key, KEYS)] = tensor
    joined: dict[str, Any] = {}
    for place, books in tables.items():
        joined[place] = torch.stack([books[i] for i in sorted(books)])
    if f"{EMBEDDER}quantizer" in joined:
        vectors = joined[f"{EMBEDDER}quantizer"].float()
        converted["embedding.code_vectors"] = F.normalize(vectors, dim=-1)
    if "ar_head" in joined:
        converted["head.embedding.weight"] = joined["ar_head"].flatten(0, 1)
    return converted
