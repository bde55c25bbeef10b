"""UniTok's networks against the reference code, timm and open_clip's layout."""

import pytest
import torch
from torch import Tensor

from vqrae.tokenizer.projections import AttentionProjection


@torch.no_grad()
@pytest.mark.parametrize("widths", [(32, 8), (8, 32)])
def test_a_causal_projection_continues_from_its_cache(widths: tuple[int, int]) -> None:
    projection = AttentionProjection(*widths, num_heads=4, causal=True)
    features = torch.randn(2, 7, widths[0])
    expected = projection(features)
    later = features.clone()
    later[:, 4:] = 0
    torch.testing.assert_close(projection(later)[:, :4], expected[:, :4])
    seen: list[tuple[Tensor, ...]] = []

    def cache(*keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(keys_and_values)
        keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*seen, strict=True))
        return keys, values

    parts = [projection(part, cache=cache) for part in features.split([3, 1, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"projection_heads: got 3, expected a divisor .* 32"):
        AttentionProjection(32, 8, num_heads=3)
