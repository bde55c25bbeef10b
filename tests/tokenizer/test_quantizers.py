import pytest
import torch

from vqrae.tokenizer.quantizers import QUANTIZERS, build_quantizer, draw_by_error, kmeans, nearest_codes
from vqrae.tokenizer.quantizers import base as quantizer_base


@pytest.mark.parametrize("rows", [7, 4096])
def test_search_equals_brute_force(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_base, "SEARCH_ROWS", rows)
    torch.manual_seed(0)
    features, table = torch.randn(3, 11, 16), torch.randn(50, 16)
    brute_force = torch.cdist(features.flatten(0, 1), table).argmin(-1).view(3, 11)
    assert torch.equal(nearest_codes(features, table), brute_force)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(name, 32, 16).eval()
    features = torch.randn(2, 9, 16)
    output = quantizer(features)
    assert output.codes.shape == (2, 9)
    assert output.codes.dtype == torch.int64
    assert torch.equal(quantizer.lookup(output.codes), output.quantized)
    assert set(output.losses) == {"codebook_loss", "commitment_loss"}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_go_where_they_belong(name: str) -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(name, 32, 16).train()
    features = torch.randn(2, 9, 16, requires_grad=True)
    weights = torch.randn(2, 9, 16)
    (quantizer(features).quantized * weights).sum().backward()
    torch.testing.assert_close(features.grad, weights)  # straight through, unchanged
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())

    features.grad = None
    quantizer(features).losses["codebook_loss"].backward()
    assert features.grad is None  # moves codes only
    assert any(p.grad is not None and p.grad.any() for p in quantizer.parameters())

    quantizer.zero_grad()
    quantizer(features).losses["commitment_loss"].backward()
    assert features.grad.any()  # moves features only
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_start_from_features_and_revival(name: str) -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(name, 32, 16).eval()
    features = 3 + 2 * torch.randn(500, 16)
    with torch.no_grad():
        quantizer.initialize_from(features)
        assert quantizer(features[None]).codes.unique().numel() == 32  # every code is some feature, so every code is used
        dead, targets = torch.tensor([3, 17]), torch.full((2, 16), 9.0) + torch.eye(2, 16)
        quantizer.revive(dead, targets)
        torch.testing.assert_close(quantizer.lookup(dead), targets, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="expected at least as many"):
        quantizer.initialize_from(features[:31])


def test_cached_table_follows_the_weights() -> None:
    quantizer = build_quantizer("simvq", 8, 4).eval()
    with torch.no_grad():
        first = quantizer.lookup(torch.tensor([0]))
        quantizer.projection.bias += 1
        torch.testing.assert_close(quantizer.lookup(torch.tensor([0])), first + 1)


def test_unknown_quantizer_suggests_a_name() -> None:
    with pytest.raises(ValueError, match="Did you mean 'simvq'"):
        build_quantizer("simqv", 8, 4)


def test_kmeans_finds_clusters_and_leaves_no_centre_empty() -> None:
    torch.manual_seed(0)
    truth = 10 * torch.randn(20, 8)
    features = (truth[:, None] + 0.1 * torch.randn(20, 50, 8)).flatten(0, 1)

    def error(centers: torch.Tensor) -> torch.Tensor:
        return (features - centers[nearest_codes(features, centers)]).square().mean()

    centers = kmeans(features, 20, iterations=20)
    assert nearest_codes(features, centers).unique().numel() == 20
    assert error(centers) < 0.5 * error(kmeans(features, 20, iterations=0))
    assert torch.equal(centers, kmeans(features, 20, iterations=20))  # seeded


def test_errors_decide_what_is_drawn() -> None:
    errors = torch.zeros(100)
    errors[7] = 1.0
    drawn = draw_by_error(errors, 50, torch.Generator().manual_seed(0))
    assert (drawn == 7).float().mean() > 0.9
    assert draw_by_error(torch.zeros(10), 5, torch.Generator().manual_seed(0)).shape == (5,)
