"""Numbers of UniTok's own generators, with weights that names decide: writes `unitok_heads.json`.

    PYTHONPATH=TRANSFORMERS python tests/generation/golden/unitok_heads.py UNITOK

UNITOK is a checkout of FoundationVision/UniTok, whose classes run as they are; TRANSFORMERS holds
the version that they were written for (4.44). The tests give our modules the same weights.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from unitok_weights import (
    CODEBOOK_SIZE,
    GRID,
    LLAMA,
    NUM_CLASSES,
    NUM_CODEBOOKS,
    inputs,
    named_numbers,
)


def fill(module: nn.Module) -> nn.Module:
    """Give each weight the numbers of its name; norms are around 1."""
    for name, weight in module.named_parameters():
        numbers = named_numbers(name, tuple(weight.shape))
        weight.data = numbers + ("norm" in name and name.endswith("weight"))
    return module


def depth_head(liquid: Path) -> dict[str, Any]:
    """Logits of the head of UniTok's language model (`eval/liquid/model/arhead.py`)."""
    from transformers import LlamaConfig

    config = LlamaConfig(**LLAMA, attn_implementation="eager")
    module = load("arhead", liquid / "model" / "arhead.py")
    head = fill(module.AR_head(config, NUM_CODEBOOKS * CODEBOOK_SIZE, NUM_CODEBOOKS).eval())
    given = inputs()
    places = range(NUM_CODEBOOKS - 1)
    following = [head.codebooks[i](given["codes"][:, i]) for i in places]
    states = torch.stack([given["hidden"], *following], dim=1)
    logits = head.linear_head(head(inputs_embeds=states, use_cache=False, return_dict=False)[0])
    return {"depth_logits": logits}


def token_embedder(liquid: Path) -> dict[str, Any]:
    """Input vectors of codes (`eval/liquid/model/liquid.py`), with smaller sizes than its own."""
    quant = load("quant", liquid / "model" / "quant.py")
    embedder = nn.Module()
    embedder.quantizer = quant.VectorQuantizerM(
        NUM_CODEBOOKS * CODEBOOK_SIZE, 16, num_codebooks=NUM_CODEBOOKS
    )
    embedder.attn_projection = quant.AttnProjection(16, 32, 4)
    width = LLAMA["hidden_size"]
    norm, first = nn.LayerNorm(32, eps=1e-6), nn.Linear(32, width)
    embedder.mm_projector = nn.Sequential(norm, first, nn.GELU(), nn.Linear(width, width))
    fill(embedder.eval())
    quantized = embedder.quantizer.idx_to_f(inputs()["images"].transpose(1, 2))
    return {"embedding": embedder.mm_projector(embedder.attn_projection(quantized))}


def class_conditional(llamagen: Path) -> dict[str, Any]:
    """Loss and greedy samples of UniTok's LlamaGen (`eval/llamagen`)."""
    sys.path.insert(0, str(llamagen))
    drop_path: Any = types.SimpleNamespace(DropPath=nn.Identity)
    sys.modules["utils.drop_path"] = drop_path
    gpt = load("gpt", llamagen / "autoregressive" / "models" / "gpt.py")
    generate = load("generate", llamagen / "autoregressive" / "models" / "generate.py")
    arguments = gpt.ModelArgs(
        dim=LLAMA["hidden_size"],
        n_layer=2,
        n_head=LLAMA["num_attention_heads"],
        n_output_layer=2,
        token_dropout_p=0.0,
        resid_dropout_p=0.0,
        ffn_dropout_p=0.0,
        num_codebooks=NUM_CODEBOOKS,
        num_classes=NUM_CLASSES,
        class_dropout_prob=0.0,
        vocab_size=NUM_CODEBOOKS * CODEBOOK_SIZE,
        block_size=GRID**2,
    )
    model = fill(gpt.Transformer(arguments))
    given = inputs()
    codes = given["images"].transpose(1, 2).contiguous()
    _, loss = model.train()(codes[..., :-1], given["classes"], targets=codes)
    greedy = generate.generate(
        model.eval(), given["classes"], GRID**2, NUM_CODEBOOKS, temperature=1.0, top_k=1
    )
    names = {name: list(weight.shape) for name, weight in model.named_parameters()}
    return {
        "class_loss": loss,
        "class_greedy": greedy.transpose(1, 2),
        "class_weights": names,
    }


def load(name: str, path: Path) -> Any:
    """A module of the checkout, without its package."""
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounded(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, Tensor):
        return value.double().round(decimals=6).tolist()
    return value


@torch.no_grad()
def main(unitok: str) -> None:
    places = Path(unitok) / "eval" / "liquid", Path(unitok) / "eval" / "llamagen"
    found = {**depth_head(places[0]), **token_embedder(places[0]), **class_conditional(places[1])}
    found = {name: rounded(value) for name, value in found.items()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
