"""CLIP's prompts, and the classifier that open_clip builds with them: writes `zero_shot.json`.

    python tests/eval/golden/zero_shot.py UNITOK

UNITOK is a clone of github.com/FoundationVision/UniTok (MIT), which holds open_clip (MIT). The
model is a table of random vectors, one for each text.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

CLASSES, IMAGES, WIDTH = ["tench", "great white shark", "crane"], 12, 4


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_vector(text: str) -> torch.Tensor:
    """A random vector that the text decides, (WIDTH,)."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


class Texts(list):
    """What open_clip hands to its model, where it puts tokens."""

    def to(self, device: str) -> "Texts":
        return self


def main(unitok: Path) -> None:
    templates = load(unitok / "open_clip/zero_shot_metadata.py").OPENAI_IMAGENET_TEMPLATES
    model = SimpleNamespace(encode_text=lambda texts: torch.stack(list(map(text_vector, texts))))
    build = load(unitok / "open_clip/zero_shot_classifier.py").build_zero_shot_classifier
    classifier = build(model, Texts, CLASSES, templates)
    images = torch.stack([text_vector(f"image {i}") for i in range(IMAGES)])
    logits = 100.0 * torch.nn.functional.normalize(images, dim=-1) @ classifier
    labels = torch.arange(IMAGES) % len(CLASSES)
    # As in `accuracy` of UniTok's utils/eval_acc.py.
    correct = logits.topk(2, 1, True, True)[1].t().eq(labels)
    golden = {
        "templates": hashlib.sha256("\n".join(t("{}") for t in templates).encode()).hexdigest(),
        "classifier": classifier.T.tolist(),
        "top": [correct[:k].sum().item() / IMAGES for k in (1, 2)],
    }
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
