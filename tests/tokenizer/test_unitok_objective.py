"""UniTok's objective: contrastive losses, and its discriminator with what it sees.

golden/unitok_objective.json was made by the script of its name, from UniTok's code.
"""

import json
from pathlib import Path

import pytest
import torch
from tokenizer_trainings import DINOV2, filled, random_images
from torch.nn import functional as F
from transformers import AutoModel, Dinov2Config

from vqrae.tokenizer.augment import blurred, diff_augment, random_crop, seen
from vqrae.tokenizer.contrastive import pair_loss
from vqrae.tokenizer.discriminator import DinoV2Discriminator, build_discriminator

GOLDEN = json.loads((Path(__file__).parent / "golden" / "unitok_objective.json").read_text())


# ---- contrastive losses


def pairs(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    features = random_images(2 * rows, 4).flatten(1)[:, :5] - 0.5
    images, texts = F.normalize(features, dim=-1).chunk(2)
    return images.clone().requires_grad_(), texts.clone().requires_grad_()


def test_clip_loss_is_unitoks() -> None:
    images, texts = F.normalize(random_images(2, 8).flatten(2).transpose(0, 1), dim=-1)[:2, :, :5]
    everyone = torch.ones(len(images), dtype=torch.bool)
    loss = pair_loss("softmax", images, texts, everyone, torch.tensor(7.0).log())
    assert loss.item() == pytest.approx(GOLDEN["contrastive"][0], rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_rows_without_a_caption_take_no_part(kind: str) -> None:
    images, texts = pairs()
    scale, bias = torch.tensor(1.5), torch.tensor(-2.0)
    captioned = torch.tensor([True, False, True, True, False, True])
    loss = pair_loss(kind, images, texts, captioned, scale, bias)
    everyone = torch.ones(4, dtype=torch.bool)
    expected = pair_loss(kind, images[captioned], texts[captioned], everyone, scale, bias)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (images.grad[~captioned] == 0).all()
    assert (texts.grad[~captioned] == 0).all()
    nobody = pair_loss(kind, images, texts, ~(captioned | True), scale, bias)
    assert [x.abs().sum() for x in torch.autograd.grad(nobody, (images, texts))] == [0, 0]


def test_sigmoid_loss_by_hand() -> None:
    images, texts = pairs()
    logits = images @ texts.T * 3 - 1
    signs = 2 * torch.eye(6) - 1
    expected = -F.logsigmoid(signs * logits).sum() / 6  # SigLIP, equation 1
    everyone = torch.ones(6, dtype=torch.bool)
    scale, bias = torch.tensor(3.0).log(), torch.tensor(-1.0)
    torch.testing.assert_close(pair_loss("sigmoid", images, texts, everyone, scale, bias), expected)


# ---- discriminator


def test_unitoks_discriminator_has_its_logits() -> None:
    torch.manual_seed(0)
    discriminator = DinoV2Discriminator(AutoModel.from_config(Dinov2Config(**DINOV2)))
    assert discriminator.depths == [1, 3, 6, 9, 12]
    weight = discriminator.heads[0][0].weight.detach()
    assert weight.std() == pytest.approx(0.5 * (2 / 256) ** 0.5, rel=0.05)  # Xavier, gain 0.5
    with torch.no_grad():
        logits = filled(discriminator)(random_images(2, 28))
    torch.testing.assert_close(logits.flatten(), torch.tensor(GOLDEN["logits"]), atol=2e-5, rtol=0)
    with torch.device("meta"):
        published = build_discriminator("dinov2", channels=(), random_backbone=True)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (published.backbone, published)]
    assert sizes == [22_056_576, 29_442_821]  # DINOv2-S and its five heads


def test_discriminators_see_what_unitoks_does() -> None:
    images = random_images(2, 20)
    torch.manual_seed(0)
    torch.rand(3)
    augmented = 2 * diff_augment(images, torch.rand(7, 2, 1, 1).view(7, 2).T) - 1
    expected = torch.tensor(GOLDEN["augmented"])
    torch.testing.assert_close(augmented[..., ::3, ::3].flatten(), expected, atol=2e-6, rtol=0)
    for strength, golden in GOLDEN["blurred"].items():
        seen_through = 2 * blurred(images, float(strength)) - 1
        found = seen_through[..., ::5, ::5].flatten()
        torch.testing.assert_close(found, torch.tensor(golden), atol=2e-6, rtol=0)
    assert blurred(images, 0.0) is images
    assert seen(images, torch.rand(2, 10), 0.0, augment=False, multiple=14) is images


def test_a_crop_is_decided_by_the_numbers_of_its_image() -> None:
    images = random_images(3, 16).requires_grad_()
    random_B3 = torch.tensor([[0.2, 0.0, 0.99], [0.4, 0.5, 0.5], [0.9, 0.1, 0.1]])
    cropped = random_crop(images, random_B3, 7)
    assert cropped.shape == (3, 3, 14, 14)
    assert torch.equal(cropped[0], images[0, :, :14, 2:])
    assert torch.equal(cropped[1], images[1, :, 1:15, 1:15])
    shrunk = F.interpolate(images[2:], (14, 14), mode="area")
    torch.testing.assert_close(cropped[2:], shrunk)
    alone = seen(images[:1], torch.full((1, 10), 0.3), 0.5, augment=True, multiple=7)
    both = seen(images[:2], torch.full((2, 10), 0.3), 0.5, augment=True, multiple=7)
    torch.testing.assert_close(alone, both[:1])
    both.sum().backward()
    assert images.grad[:2].abs().amax((1, 2, 3)).min() > 0
