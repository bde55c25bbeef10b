"""Codes that cost their rate too."""

import pytest
import torch
from torch import Tensor

from vqrae.common import distributed
from vqrae.tokenizer.quantizers.simvq import SimVQ

TAKEN = torch.tensor(True)


def make(*, rate_weight: float) -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(32, 16, rate_weight=rate_weight)


def features_for(quantizer: SimVQ, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, quantizer.codebook_dim, generator=generator)


def squared_distances(features: Tensor, table: Tensor) -> Tensor:
    return (features[..., None, :] - table).square().sum(-1)


def test_a_code_costs_its_distance_and_its_rate() -> None:
    quantizer = make(rate_weight=0.1).train()
    features = features_for(quantizer, 4, 50)
    nearest = squared_distances(features, quantizer.table()).argmin(-1)
    assert torch.equal(quantizer(features).codes, nearest)  # as long as nothing was counted
    quantizer.after_step(TAKEN)
    rates = quantizer.rates
    torch.testing.assert_close(rates.variance[0], features.flatten(0, 1).var(0, correction=0).sum())
    shares = torch.bincount(nearest.flatten(), minlength=32) / nearest.numel()
    torch.testing.assert_close(rates.shares, 0.98 / 32 + 0.02 * shares)
    with torch.no_grad():
        rates.shares.copy_(torch.linspace(0, 1, 32) / 16)  # the first one was never chosen
    prices = 0.1 * rates.variance * -rates.shares.clamp(min=1e-5).log()
    expected = (squared_distances(features, quantizer.table()) + prices).argmin(-1)
    assert not torch.equal(expected, nearest)
    assert torch.equal(quantizer.eval()(features).codes, expected)
    loaded = make(rate_weight=0.1).eval()
    loaded.load_state_dict(quantizer.state_dict())
    assert torch.equal(loaded(features).codes, expected)


def test_rates_start_again_with_the_codebook_and_with_a_code() -> None:
    quantizer = make(rate_weight=0.1).train()
    features = features_for(quantizer, 4, 50)
    quantizer(features)
    quantizer.after_step(TAKEN)
    quantizer.reinitialize(torch.tensor([3]), features[0, :1])
    assert quantizer.rates.shares[3] == 1 / 32
    quantizer.initialize_from(features.flatten(0, 1))
    assert (quantizer.rates.shares == 1 / 32).all()
    assert quantizer.rates.variance == 0


def test_rates_of_micro_batches_and_processes_equal_those_of_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, first, second = (make(rate_weight=0.1).train() for _ in range(3))
    features = features_for(whole, 4, 50)
    whole(features)
    whole.after_step(TAKEN)
    for part in features[:2].split(1):
        first(part)
    second(features[2:])
    monkeypatch.setattr(distributed.torch.distributed, "is_initialized", lambda: True)
    add = lambda tensor: tensor.add_(second.rates._sums)  # noqa: E731
    monkeypatch.setattr(distributed.torch.distributed, "all_reduce", add)
    first.after_step(TAKEN)
    torch.testing.assert_close(first.state_dict(), whole.state_dict())


def test_rates_lower_the_entropy_of_codes() -> None:
    """Most features differ by less than codes do: they take one code instead of several."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, 2000, 16, generator=generator)
    features[:, 500:] = 3 + 0.1 * features[:, 500:]
    entropies = []
    for weight in (0.0, 0.02):
        quantizer = make(rate_weight=weight).train()
        quantizer.initialize_from(features[0])
        for _ in range(100):
            codes = quantizer(features).codes
            quantizer.after_step(TAKEN)
        shares = torch.bincount(codes.flatten(), minlength=32) / codes.numel()
        entropies.append(-torch.special.xlogy(shares, shares).sum())
    assert entropies[1] < 0.8 * entropies[0]
