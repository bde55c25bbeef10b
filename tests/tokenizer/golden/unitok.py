"""What UniTok's own code makes of fixed weights and inputs: writes `unitok.json`, which the tests compare with.

    python tests/tokenizer/golden/unitok.py UNITOK

UNITOK is a checkout of FoundationVision/UniTok (@bb8012e). Its classes run as they are, at a small size: the numbers of
`vitamin_base` are replaced in the text of models/vitamin.py before it is compiled, and two of its classes ignore arguments
that today's timm passes. `names` are those of the state dict at full size: how many blocks have it, and its shape; `small_names` those of the small.
"""

import json
import re
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# fmt: off
SMALL = {
    "embed_dim=(128, 256, 768)": "embed_dim=(16, 24, 32)", "stem_width=128": "stem_width=16",
    "embed_dim=768, depth=14, num_heads=12": "embed_dim=32, depth=3, num_heads=2",
    "'vitamin_base': (768, 256, 128)": "'vitamin_base': (32, 24, 16)",
}
ARGUMENTS: dict[str, Any] = {
    "model": "vitamin_base", "img_size": 64, "vocab_width": 16, "vocab_size": 4 * 32, "num_codebooks": 4,
    "embed_dim": 24, "text_width": 32, "text_heads": 2, "text_layers": 2, "text_vocab_size": 50, "text_context_length": 9,
}
TOKENS = [[48, 3, 5, 49, 0, 0, 0, 0, 0], [48, 7, 1, 2, 9, 49, 0, 0, 0]]
# fmt: on


def fill(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without a random generator: sines, larger in matrices of few columns. Vectors are near those of a norm."""
    filled = {}
    for number, (key, tensor) in enumerate(sorted(state.items())):
        angles = torch.arange(tensor.numel(), dtype=torch.float64) * (1 + number % 7) * 0.7 + number
        waves = torch.sin(angles * angles.sqrt()).view(tensor.shape)
        if re.search(r"pos_embed$|zero_k_bias$|vocab_usage$", key):
            filled[key] = torch.zeros_like(tensor)
        elif tensor.ndim < 2:
            filled[key] = (0.1 * waves + key.endswith("weight")).to(tensor.dtype)
        else:
            filled[key] = (waves * (2 / tensor[0].numel()) ** 0.5).to(tensor.dtype)
    return filled


def images() -> Tensor:
    """Two images (2, 3, 64, 64) in [0, 1]."""
    rows = torch.linspace(0, 1, 64)
    base = torch.sin(12 * rows[:, None] * rows) * torch.cos(5 * rows)[:, None]
    channels = [base, base.T, (base + rows) / 2]
    image = torch.stack(channels).clamp(-1, 1) / 2 + 0.5
    return torch.stack([image, image.flip(-1)])


def summary(tensor: Tensor) -> list[float]:
    """Some of its values, then mean and deviation."""
    flat = tensor.double().flatten()
    picked = flat[:: max(1, len(flat) // 20)]
    return [
        round(number, 6) for number in [*picked.tolist(), flat.mean().item(), flat.std().item()]
    ]


def ignore(kind: type[nn.Module], *names: str) -> None:
    original = kind.__init__

    def init(self: nn.Module, *args: Any, **options: Any) -> None:
        original(self, *args, **{key: value for key, value in options.items() if key not in names})

    kind.__init__ = init  # type: ignore[method-assign]


def load_unitok(folder: Path) -> tuple[Any, Any]:
    """The classes `UniTok` and `Args`."""
    sys.path.insert(0, str(folder))
    tap = types.ModuleType("tap")
    tap.Tap = object  # type: ignore[attr-defined]
    open_clip = types.ModuleType("open_clip")  # without its __init__, which opens a vocabulary
    open_clip.__path__ = [str(folder / "open_clip")]
    sys.modules |= {"tap": tap, "open_clip": open_clip}
    import models.vitamin as vitamin

    text = (folder / "models" / "vitamin.py").read_text()
    for old, new in SMALL.items():
        assert old in text, old
        text = text.replace(old, new)
    exec(compile(text, "vitamin.py", "exec"), vitamin.__dict__)
    ignore(vitamin.HybridEmbed, "device", "dtype")
    ignore(vitamin.GeGluMlp, "device", "dtype", "norm_layer", "bias")
    import models.unitok as unitok
    from utils.config import Args

    unitok.ViTaminDecoder, unitok.GeGluMlp = vitamin.ViTaminDecoder, vitamin.GeGluMlp
    return unitok.UniTok, Args


def names_and_shapes(state: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Names with `#` for the number of a block -> [how many blocks have it, shape]."""
    counts: dict[str, list[Any]] = defaultdict(lambda: [0, []])
    for key, tensor in state.items():
        name = re.sub(r"(blocks|codebooks)\.\d+\.", r"\1.#.", key)
        assert counts[name][1] in ([], list(tensor.shape))
        counts[name] = [counts[name][0] + 1, list(tensor.shape)]
    return counts


@torch.no_grad()
def main(folder: str) -> None:
    unitok_class, args_class = load_unitok(Path(folder))
    args = args_class()
    args.grad_ckpt = False
    with torch.device("meta"):
        large = unitok_class(args).state_dict()
    for key, value in ARGUMENTS.items():
        setattr(args, key, value)
    model = unitok_class(args).eval()
    model.load_state_dict(fill(model.state_dict()))
    pixels = 2 * images() - 1
    tokens = torch.tensor(TOKENS)
    codes = model.img_to_idx(pixels)
    quantized = model.post_quant_proj(model.quantizer.idx_to_f(codes))
    golden = {
        "names": names_and_shapes(large),
        "small_names": names_and_shapes(model.state_dict()),
        "codes": codes.tolist(),  # (B, n, N)
        "features": summary(model.encoder(pixels)),
        "quantized_features": summary(quantized),
        "reconstruction": summary((model.idx_to_img(codes) + 1) / 2),
        "image_embeddings": summary(model.encode_image(pixels, normalize=True)),
        "text_embeddings": summary(model.encode_text(tokens, normalize=True)),
    }
    rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
