"""Numbers of UniTok's own discriminator, augmentation and contrastive loss: writes `unitok_objective.json`.

    python tests/tokenizer/golden/unitok_objective.py UNITOK

UNITOK is a checkout of FoundationVision/UniTok. Its classes run as they are, on a small DINOv2 whose weights the tests make,
too. Two things are set apart: the offset of 0.1 in the size to which position embeddings are resized, which the Hugging Face
class does not have, and random crops, which images of whole patches do not get.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from tokenizer_trainings import DINOV2, filled, random_images
from transformers import AutoModel, Dinov2Config

from vqrae.tokenizer.discriminator import DinoV2Discriminator

BACKBONE = [
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""), ("encoder.layer.", "blocks."), ("attention.o_proj", "attn.proj"), ("layernorm", "norm"),
    ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
]  # fmt: skip
HEADS = {"0": "0.0", "1": "0.1", "3.0": "1.fn.0", "3.1": "1.fn.1", "4": "2"}


def backbone_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's own names; queries, keys and values in one matrix."""
    found: dict[str, Any] = {}
    for key, value in weights.items():
        for ours, theirs in BACKBONE:
            key = key.replace(ours, theirs)
        block, _, rest = key.partition(".attention.")
        if rest:
            found.setdefault(f"{block}.attn.qkv.{rest.split('.')[1]}", []).append(value)
        else:
            found[key] = value
    return {
        key: torch.cat(value) if isinstance(value, list) else value for key, value in found.items()
    }


def head_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in weights.items():
        if key.startswith("heads."):
            number, place, kind = (
                key.split(".")[1],
                key.split(".", 2)[2].rsplit(".", 1)[0],
                key.rsplit(".", 1)[1],
            )
            found[f"heads.{number}.{HEADS[place]}.{kind}"] = value
    return found


def logits(unitok: Path) -> list[float]:
    from models import dinov2, discrim

    config = Dinov2Config(**DINOV2)
    ours = filled(DinoV2Discriminator(AutoModel.from_config(config)))
    backbone = dinov2.DinoVisionTransformer(
        img_size=config.image_size, patch_size=14, embed_dim=config.hidden_size, num_heads=2, depth=12, init_values=1.0,
        block_fn=lambda **options: dinov2.Block(attn_class=dinov2.MemEffAttention, **options), block_chunks=0, interpolate_offset=0.0,
    )  # fmt: skip
    backbone.load_state_dict(backbone_weights(ours.backbone.state_dict()))
    discrim.make_dinov2_model = lambda **options: backbone
    discrim.torch.load = lambda path: backbone.state_dict()
    theirs = discrim.DinoDiscV2(
        9, "cpu", "", norm_type="gn", use_specnorm=False, key_depths=(0, 2, 5, 8, 11)
    )
    theirs.load_state_dict(head_weights(ours.state_dict()), strict=False)
    with torch.no_grad():
        return theirs(2 * random_images(2, 28) - 1)


def main(unitok: Path) -> None:
    sys.path.insert(0, str(unitok))
    # What nothing here uses; and a package whose __init__ reads a file that is not in the checkout.
    for name in ("tap", "pytz"):
        sys.modules[name] = mock.MagicMock(Tap=object)
    sys.modules["open_clip"] = types.ModuleType("open_clip")
    sys.modules["open_clip"].__path__ = [str(unitok / "open_clip")]
    from open_clip.loss import ClipLoss
    from utils.diffaug import DiffAug

    augmenter, images = DiffAug(prob=1.0, cutout=0.2), 2 * random_images(2, 20) - 1
    torch.manual_seed(0)
    augmented = augmenter.aug(images)
    features = F.normalize(random_images(2, 8).flatten(2).transpose(0, 1), dim=-1)[:2, :, :5]
    golden = {
        "logits": logits(unitok),
        "augmented": augmented[..., ::3, ::3],
        "blurred": {strength: DiffAug(prob=0.0).aug(images, float(strength))[..., ::5, ::5] for strength in ("1", "0.5")},
        "contrastive": ClipLoss()(features[0], features[1], torch.tensor(7.0)),
    }  # fmt: skip
    file = Path(__file__).with_suffix(".json")
    file.write_text(
        json.dumps(golden, default=lambda tensor: [round(x, 6) for x in tensor.flatten().tolist()])
        + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
