import pytest
import torch

from vqrae.tokenizer.codebook import CodeUsage
from vqrae.tokenizer.discriminator import BlurDownsample, PatchDiscriminator
from vqrae.tokenizer.losses import LeCam, discriminator_hinge_loss, generator_hinge_loss


def test_hinge_signs() -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_hinge_loss(real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    logits = torch.zeros(4, requires_grad=True)
    generator_hinge_loss(logits).backward()
    assert (logits.grad < 0).all()
    assert discriminator_hinge_loss(torch.tensor([2.0]), torch.tensor([-2.0])) == 0


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([-2.0, 0.0, 2.0])
    expected = 0.5 * ((0.5 + 0 + 2) / 3 + (0 + 1 + 3) / 3)
    torch.testing.assert_close(discriminator_hinge_loss(real, fake), torch.tensor(expected))
    assert generator_hinge_loss(torch.tensor([1.0, 2.0, 6.0])) == -3


def test_lecam_pulls_towards_the_other_class_and_keeps_its_means() -> None:
    lecam = LeCam(decay=0.9)
    lecam.update(torch.tensor(1.0), torch.tensor(-1.0))
    torch.testing.assert_close(lecam.real_mean, torch.tensor(0.1))
    torch.testing.assert_close(lecam.fake_mean, torch.tensor(-0.1))
    torch.testing.assert_close(
        lecam(torch.tensor([0.5]), torch.tensor([-0.5])), torch.tensor(0.6**2 + 0.6**2)
    )
    assert set(lecam.state_dict()) == {"real_mean", "fake_mean"}


def test_lecam_steers_logits_by_fixed_statistics() -> None:
    lecam = LeCam(decay=0.0)
    lecam.update(torch.tensor(0.4), torch.tensor(-0.6))
    real, fake = (
        torch.tensor([0.1, 0.5], requires_grad=True),
        torch.tensor([1.0, 2.0], requires_grad=True),
    )
    loss = lecam(real, fake)
    torch.testing.assert_close(
        loss, torch.tensor((0.3 + 0.6) ** 2)
    )  # the second term is off: fake lies above the real mean
    loss.backward()
    torch.testing.assert_close(real.grad, torch.full((2,), 2 * 0.9 / 2))
    assert (fake.grad == 0).all()
    assert not lecam.real_mean.requires_grad
    lecam.observe(real, fake)
    lecam.observe(real + 1, fake - 1)
    torch.testing.assert_close(lecam.take_means(), torch.tensor([0.8, 1.0]))
    lecam.observe(real, fake)
    torch.testing.assert_close(
        lecam.take_means(), torch.tensor([0.3, 1.5])
    )  # what was taken is forgotten


def test_discriminator_shapes_and_blur() -> None:
    logits = PatchDiscriminator((8, 16, 16))(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 1, 16, 16)
    constant = torch.full((1, 4, 8, 8), 0.7)
    torch.testing.assert_close(
        BlurDownsample(4)(constant)[..., 1:-1, 1:-1], torch.full((1, 4, 2, 2), 0.7)
    )


def test_published_size() -> None:
    with torch.device("meta"):
        networks = PatchDiscriminator(), PatchDiscriminator((128, 128, 256, 512, 1024))
        parameters = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert parameters == [1_909_889, 7_431_297]  # TiTok's 1.91 M, MaskBit's 7.43 M


def test_usage_counts_only_what_it_saw() -> None:
    usage = CodeUsage(8)
    assert usage.usage == 0
    usage.update(torch.full((2, 5), 3))
    assert usage.usage == 1 / 8
    assert usage.perplexity == pytest.approx(1)
    usage.update(torch.arange(8))
    assert usage.usage == 1
    usage.clear()
    usage.update(torch.arange(8))
    assert usage.perplexity == pytest.approx(8)
