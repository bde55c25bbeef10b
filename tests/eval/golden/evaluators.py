"""What public evaluators say about some images: PSNR, SSIM, and levels that Inception is shown.

Makes evaluators.json from checkouts at the commits that eval/reconstruction/protocols.py names,
with scikit-image and torch-fidelity:

    python tests/eval/golden/evaluators.py VGT 1d-tokenizer maskbit RAE > evaluators.json
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (
    torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)


def images_and_copies() -> tuple[Tensor, Tensor]:
    """Two images at whole levels, and copies between levels, both (2, 3, 256, 256) in [0, 1]."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((2, 3, 8, 8), dtype=np.float32))
    images = (torch.nn.functional.interpolate(coarse, 256, mode="bilinear") * 255).round() / 255
    copies = images + torch.from_numpy(rng.normal(0, 0.05, (2, 3, 256, 256)).astype(np.float32))
    return images, copies.clamp(0, 1)


class Shown:
    """An Inception network that remembers the sum of levels of each image of the first batch."""

    def __init__(self) -> None:
        self.levels: list[int] = []

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8
        self.levels = self.levels or images.long().sum((1, 2, 3)).tolist()
        sizes = {"2048": 2048, "logits_unbiased": 1008}
        return {name: torch.zeros(len(images), size) for name, size in sizes.items()}

    def to(self, device: Any) -> "Shown":
        return self

    def eval(self) -> None:
        pass


def load(folder: str, name: str, **absent: types.ModuleType) -> Any:
    """A module of a checkout, whose names others have too. `absent`: imports not needed here."""
    names = ("evaluator", "metrics", "modeling", "eval")
    for other in [key for key in sys.modules if key.partition(".")[0] in names]:
        del sys.modules[other]
    sys.modules.update(absent)
    sys.path.insert(0, folder)
    module = importlib.import_module(name)
    sys.path.pop(0)
    return module


def vgt(checkout: Path, images: Tensor, copies: Tensor) -> dict[str, Any]:
    module = load(str(checkout / "tokenizer"), "evaluator.evaluator")
    shown, module.get_inception_model = Shown(), lambda: shown
    evaluator = module.Evaluator("cpu", enable_rfid=True, enable_inception_score=False)
    evaluator.update((images - MEAN) / STD, copies * 2 - 1)
    lists = {"psnr": evaluator.psnr_val_rgb, "ssim_range_2": evaluator.ssim_val_rgb}
    means = {name: float(np.mean(values)) for name, values in lists.items()}
    return {**means, "levels": shown.levels}


def titok(checkout: Path, images: Tensor, copies: Tensor) -> dict[str, Any]:
    module = load(str(checkout), "evaluator.evaluator")
    shown, module.get_inception_model = Shown(), lambda: shown
    rounded = torch.round(copies * 255.0) / 255.0  # utils/train_utils.py, eval_reconstruction
    options = {"enable_rfid": True, "enable_inception_score": False}
    module.VQGANEvaluator("cpu", **options).update(images, rounded)
    return {"levels": shown.levels}


def maskbit(checkout: Path, images: Tensor, copies: Tensor) -> dict[str, Any]:
    modules: Any = types.ModuleType("modeling.modules")
    modules.LPIPS = None
    absent = {"modeling": types.ModuleType("modeling"), "modeling.modules": modules}
    module = load(str(checkout), "evaluator.evaluator", **absent)
    shown, module.get_inception_model = Shown(), lambda: shown
    options = {"enable_rfid": True, "enable_psnr_score": True, "enable_ssim_score": True}
    evaluator = module.TokenizerEvaluator("cpu", **options)
    evaluator.update(images, copies)
    sums = {"psnr": evaluator._sum_of_batchwise_psnr, "ssim": evaluator._sum_of_ssim}
    means = {name: value.item() / len(images) for name, value in sums.items()}
    return {**means, "levels": shown.levels}


def rae(checkout: Path, images: Tensor, copies: Tensor) -> dict[str, Any]:
    module = load(str(checkout / "src"), "eval", requests=types.ModuleType("requests"))
    # Originals are read as levels; copies become levels as in evaluate_reconstruction_distributed.
    batches = ((images * 255).round(), copies.mul(255))
    levels = [batch.permute(0, 2, 3, 1).to(dtype=torch.uint8).numpy() for batch in batches]
    options = {"metrics_to_compute": ("psnr", "ssim")}
    found = module.compute_reconstruction_metrics(*levels, torch.device("cpu"), **options)
    return {**found, "levels": levels[1].astype(int).sum((1, 2, 3)).tolist()}


def main(checkouts: list[str]) -> None:
    names = ("vgt", "titok", "maskbit", "rae")
    found = {}
    for name, read, checkout in zip(names, (vgt, titok, maskbit, rae), checkouts, strict=True):
        found[name] = read(Path(checkout), *images_and_copies())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
