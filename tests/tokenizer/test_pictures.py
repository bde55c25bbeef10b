import torch

from vqrae.tokenizer.pictures import cutmix


def mixed(share: float, seed: int = 0) -> torch.Tensor:
    """Pictures 0 … 63 of one grey each, mixed; which of them every cell of an 8 x 8 grid shows, (64, 8, 8)."""
    images = torch.arange(64.0)[:, None, None, None].expand(64, 3, 32, 32)
    result = cutmix(images, share, torch.Generator().manual_seed(seed))
    cells = result[:, 0, ::4, ::4]
    assert torch.equal(result, cells[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(result))
    return cells


def test_cutmix_puts_one_rectangle_of_the_neighbour_into_a_picture() -> None:
    own = torch.arange(64.0)[:, None, None]
    foreign = mixed(1.0) != own
    assert torch.equal(mixed(1.0)[foreign], own.roll(1, 0).expand(64, 8, 8)[foreign])
    rows, columns = foreign.any(2), foreign.any(1)
    assert torch.equal(foreign, rows[:, :, None] & columns[:, None])
    for side in (rows, columns):
        assert side.sum(1).min() >= 2
        assert side.sum(1).max() <= 6
        assert torch.equal(side.int().diff(dim=1).clamp(min=0).sum(1) + side[:, 0], torch.ones(64))  # in one piece
        assert side.any(0).all()  # everywhere


def test_cutmix_takes_its_share_and_follows_its_seed() -> None:
    own = torch.arange(64.0)[:, None, None]
    assert torch.equal(mixed(0.0), own.expand(64, 8, 8))
    assert 16 < (mixed(0.5) != own).flatten(1).any(1).sum() < 48
    assert torch.equal(mixed(0.5), mixed(0.5))
    assert not torch.equal(mixed(0.5), mixed(0.5, seed=1))
