"""What UniTok's own quantizer makes of a random feature: codes, vectors, losses and gradients.

git clone https://github.com/FoundationVision/UniTok
python tests/tokenizer/golden/unitok_quantizer.py UniTok > tests/tokenizer/golden/unitok_quantizer.json
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODEBOOKS, CODES, WIDTH = 4, 16, 3


def unitok_quantizer(checkout: Path) -> Any:
    """Its class, without the packages that its training imports."""
    utils = types.ModuleType("utils")
    utils.dist = types.SimpleNamespace(initialized=lambda: False)  # type: ignore[attr-defined]
    sys.modules["utils"] = utils
    spec = importlib.util.spec_from_file_location("quant", checkout / "models" / "quant.py")
    assert spec is not None, "the file is there"
    assert spec.loader is not None, "it is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VectorQuantizerM


def numbers(tensor: Tensor) -> list:
    return torch.round(tensor.detach().double(), decimals=6).tolist()


def main() -> None:
    torch.manual_seed(0)
    quantizer = unitok_quantizer(Path(sys.argv[1]))(
        CODEBOOKS * CODES, CODEBOOKS * WIDTH, num_codebooks=CODEBOOKS
    )
    tables = [each.codebook.weight for each in quantizer.codebooks]
    features = torch.randn(1, 5, CODEBOOKS * WIDTH, requires_grad=True)
    weights = torch.randn(1, 5, CODEBOOKS * WIDTH)
    quantized, loss, _, _ = quantizer(features)
    ((quantized * weights).sum() + loss).backward()
    codes = quantizer.f_to_idx(features)
    found = {
        "codebook": numbers(torch.stack(tables)),
        "features": numbers(features),
        "weights": numbers(weights),
        "codes": codes.transpose(1, 2).tolist(),  # theirs are (B, n, N)
        "vectors": numbers(quantizer.idx_to_f(codes)),
        "loss": loss.item(),
        "feature_gradient": numbers(features.grad),
        "codebook_gradient": numbers(torch.stack([table.grad for table in tables])),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
