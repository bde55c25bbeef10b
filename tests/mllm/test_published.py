"""The full-size configuration: UniTok's parts, counted on the meta device."""

import torch

from vqrae.common.checkpoints import count_parameters
from vqrae.common.config import load_config, shipped_config
from vqrae.common.dry_run import known_config
from vqrae.mllm.config import MLLMConfig
from vqrae.mllm.modeling import UnifiedConfig, UnifiedModel
from vqrae.tokenizer.dry_run import tokenizer_config


def test_parameters_are_those_of_unitoks_model() -> None:
    config = load_config(MLLMConfig, shipped_config("vqrae.mllm", "unitok_mllm"))
    visual = tokenizer_config(config.tokenizer)
    projection = {"kind": "attention", "num_heads": 16, "code_dim": 8, "in_dim": 64}
    values = UnifiedConfig(
        llm_config=known_config(config.llm).to_dict(),
        num_codebooks=visual.num_codebooks,
        codebook_size=visual.codebook_size,
        projection=projection | {"out_dim": visual.feature_dim},
        head={"num_layers": config.depth.num_layers},
    )
    with torch.device("meta"):
        model = UnifiedModel(values)
    sizes = {name: count_parameters(part)[0] for name, part in model.named_children()}
    width, inner, books, codes = 4096, 11008, visual.num_codebooks, visual.codebook_size
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    head = 3 * layer + width + ((books - 1) * codes + codes) * width + codes
    assert (books, codes, visual.code_shape) == (8, 4096, (256, 8))
    assert sizes["llm"] == 6_738_415_616  # Llama-2-7B
    assert sizes["head"] == head == 741_376_000
    assert count_parameters(model.embedding.mlp)[0] == 2 * 1024 + 1025 * width + (width + 1) * width
    assert count_parameters(model.embedding.projection)[0] == 7_615_744
