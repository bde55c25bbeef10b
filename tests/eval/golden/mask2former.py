"""What mmdetection computes for GenEval's detector with random weights, from pixels to boxes.

Makes mask2former.json, with mmdet 2.28.2 and mmcv 1.7.2 (pure Python: MMCV_WITH_OPS=0):

    python tests/eval/golden/mask2former.py > tests/eval/golden/mask2former.json
"""

import json
import sys
import tempfile
import types
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CONFIG = "mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py"
SIZES = ((60, 40), (33, 77), (64, 64))
STRIDE = 9973  # of the pixels that are compared


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights for tensors of mmdetection's names and shapes, each seeded by its name."""
    found = {}
    for name, shape in shapes.items():
        seed = zlib.crc32(name.encode())
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if len(shape) == 1:
            norm = name.endswith("weight")
            found[name] = norm + (2.0 if "sampling_offsets" in name else 0.2) * noise
        else:
            found[name] = noise * (1.0 if "bias_table" in name else noise[0].numel() ** -0.5)
    return found


def image(size: tuple[int, int]) -> Image.Image:
    """A smooth random image of (width, height)."""
    noise = np.random.default_rng(size).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def pixels() -> Tensor:
    """What the network is given: (1, 3, 96, 128)."""
    return torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def sample(classes: Tensor, masks: Tensor) -> dict[str, list[float]]:
    """Some of the logits (100, 81) and (100, 24, 32)."""
    parts = {"classes": classes[::7, ::9], "masks": masks[::11, ::7, ::7]}
    rounded = {}
    for name, part in parts.items():
        rounded[name] = [round(value, 5) for value in part.flatten().tolist()]
    return rounded


def logits(number: int) -> tuple[Tensor, Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Random logits of classes and masks; sizes of the padded, resized and original image."""
    generator = torch.Generator().manual_seed(number)
    classes = 4 * torch.randn(100, 81, generator=generator)
    masks = 3 * torch.randn(100, 16, 20, generator=generator) - 3 * number
    masks[:3] = -5  # empty ones
    return classes, masks, (256, 320), (250, 300), ((512, 614), (100, 120))[number]


def rows(found: Iterable[tuple[int, float, Any]]) -> list[list[float]]:
    """Instances (class, score, box) in an order of their own."""
    return sorted([label, round(float(score), 5), *map(float, box)] for label, score, box in found)


class Compiled(types.ModuleType):
    """mmcv's compiled kernels, which Mask2Former does without on a CPU."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def main() -> None:
    sys.modules["mmcv._ext"] = Compiled("mmcv._ext")
    import mmdet
    from mmcv import Config
    from mmdet.core import bbox2result
    from mmdet.datasets import replace_ImageToTensor
    from mmdet.datasets.pipelines import Compose
    from mmdet.models import build_detector

    config = Config.fromfile(str(Path(mmdet.__file__).parent / ".mim" / "configs" / CONFIG))
    pipeline = Compose(replace_ImageToTensor(config.data.test.pipeline))
    mean, std = (np.array(config.img_norm_cfg[key]) for key in ("mean", "std"))
    prepared = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            image(size).save(Path(folder) / "image.png")
            data = pipeline({"img_info": {"filename": f"{folder}/image.png"}, "img_prefix": None})
            tensor, meta = data["img"][0].data, data["img_metas"][0].data
            levels = np.rint(tensor.permute(1, 2, 0).numpy() * std + mean).astype(int)
            covered = list(meta["img_shape"][:2])
            case = {"covered": covered, "padded": list(tensor.shape[1:])}
            case["margin"] = tensor[:, -1, -1].tolist()
            inside = levels[: covered[0], : covered[1]].reshape(-1)[::STRIDE]
            prepared.append({**case, "levels": inside.tolist()})
    config.model.backbone.init_cfg = config.model.train_cfg = None
    model = build_detector(config.model, test_cfg=config.get("test_cfg")).eval()
    parameters = {name: list(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(weights(parameters), strict=False)
    shape = tuple(pixels().shape[2:])
    metas = [{"batch_input_shape": shape, "img_shape": (*shape, 3), "ori_shape": (*shape, 3)}]
    with torch.no_grad():
        classes, masks = model.panoptic_head(model.extract_feat(pixels()), metas)
    network = sample(classes[-1][0], masks[-1][0])
    fused = []
    for number in range(2):
        of_classes, of_masks, padded, resized, size = logits(number)
        linear = {"mode": "bilinear", "align_corners": False}
        upsampled = torch.nn.functional.interpolate(of_masks[None], padded, **linear)
        metas = [{"img_shape": (*resized, 3), "ori_shape": (*size, 3)}]
        fuse = model.panoptic_fusion_head.simple_test
        found = fuse(of_classes[None], upsampled, metas, rescale=True)[0]
        labels, boxes, _ = found["ins_results"]
        by_class = enumerate(bbox2result(boxes, labels, 80))
        fused.append(rows([(label, box[4], box[:4]) for label, found in by_class for box in found]))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    values = {"prepared": prepared, "network": network, "fused": fused, "shapes": shapes}
    print(json.dumps(values))


if __name__ == "__main__":
    main()
