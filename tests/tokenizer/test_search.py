"""The search gives the exact nearest code, in any precision and any blocks, with bounded memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vqrae.tokenizer.quantizers import search
from vqrae.tokenizer.quantizers.search import best_codes, nearest_codes

PRECISIONS = ["fp32", "bf16"]


def exact(features: Tensor, table: Tensor) -> Tensor:
    """The lowest of the codes at the smallest distance, by differences in float64."""
    distance = (features.double()[..., None, :] - table.double()).square().sum(-1)
    return (distance <= distance.amin(-1, keepdim=True) * (1 + 1e-12)).int().argmax(-1)


def near_codes(case: str) -> tuple[Tensor, Tensor]:
    """Features (200, E) and a table (160, E) on which a rounded product errs."""
    torch.manual_seed(0)
    features, table = torch.randn(200, 24), torch.randn(160, 24)
    if case == "clusters":  # ten codes within bf16 rounding of each other, and features among them
        table = (torch.randn(16, 1, 24) + 1e-3 * torch.randn(16, 10, 24)).flatten(0, 1)
        features = table[torch.randint(160, (200,))] + 1e-3 * torch.randn(200, 24)
    elif case == "one cluster":  # more than may be candidates, so that bf16 gives up, within fp32's error
        table = torch.randn(24) + 1e-5 * torch.randn(160, 24)
        features = table[torch.randint(160, (200,))] + 1e-5 * torch.randn(200, 24)
    elif case == "neighbouring floats":
        table = torch.randn(24).expand(160, 24).clone()
        for row in range(1, 160):
            table[row, row % 24] = torch.nextafter(table[row, row % 24], torch.tensor(float(row % 2 * 200 - 100)))
        features = table[torch.randint(160, (200,))] + torch.randn(200, 24)
    elif case == "copies":
        table = table[:3].repeat(54, 1)[:160]  # more of each than may be candidates
    elif case == "outlier channel":  # a common part a thousand times as large as what decides
        features[:, 3] += 1000
        table[:, 3] += 1000
    elif case == "one huge code":
        table[7] *= 1e4
    elif case == "codes around the origin":  # as plain VQ starts
        table *= 1e-4
    elif case == "worst rounding":  # features, table and products all lose half a bf16 step, in the direction of a code
        signs = torch.randn(79, 257).sign()
        table = (1 + 0.99 * 2**-8) * torch.cat([torch.ones(1, 257), -torch.ones(1, 257), signs, -signs])
        features = torch.full((200, 257), 1 + 0.99 * 2**-8)
    elif case == "features are codes":
        features = table[torch.randint(160, (200,))]
    return features, table


CASES = [
    "random",
    "clusters",
    "one cluster",
    "neighbouring floats",
    "copies",
    "outlier channel",
    "one huge code",
    "codes around the origin",
    "worst rounding",
    "features are codes",
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_are_the_exact_ones(case: str, precision: search.Precision) -> None:
    features, table = near_codes(case)
    assert torch.equal(nearest_codes(features, table, precision=precision), exact(features, table))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_features_at_width(precision: search.Precision) -> None:
    torch.manual_seed(0)
    features, table = torch.randn(2, 150, 256), torch.randn(1000, 256)
    codes = nearest_codes(features, table, precision=precision)
    assert codes.shape == (2, 150)
    assert torch.equal(codes, torch.cdist(features.double(), table.double()).argmin(-1))
    plain = (features.bfloat16() @ table.bfloat16().T - table.square().sum(-1) / 2).argmax(-1)
    assert not torch.equal(plain, codes)  # what bf16 alone would give


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scores", [1, 1000, 2**22])
@pytest.mark.parametrize("codebook_size", [1, 7, 129])
def test_blocks_do_not_matter(
    precision: search.Precision, scores: int, codebook_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BLOCK_SCORES", dict.fromkeys(PRECISIONS, scores))
    features, table = near_codes("clusters")
    table = table[:codebook_size]
    assert torch.equal(nearest_codes(features, table, precision=precision), exact(features, table))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_largest_product(precision: search.Precision) -> None:
    features, table = near_codes("random")
    codes = best_codes(features, table, torch.zeros(160, dtype=torch.float64), precision=precision)
    assert torch.equal(codes, (features.double() @ table.double().T).argmax(-1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", list(search.SCORERS))
def test_no_score_is_further_off_than_its_slack(case: str, name: str) -> None:
    features, table = near_codes(case)
    offsets = table.double().square().sum(-1) / 2
    scores, slack = search.SCORERS[name](table, offsets)(features)
    error = scores.double() - (features.double() @ table.double().T - offsets)
    # The shift that all codes of a feature share is unknown; some shift must put every error within the slack.
    assert ((error.amax(-1) - error.amin(-1)) / 2 <= slack).all()


def test_fp32_slack_follows_pytorchs_setting() -> None:
    """Where the setting lets fp32 products lose bits, the slack covers the loss; few CPUs act on the setting."""
    features, table = near_codes("worst rounding")
    offsets = table.double().square().sum(-1) / 2
    lost = features.double() @ table.double().T - (features.bfloat16().double() @ table.bfloat16().double().T)
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        _, covering = search.SCORERS["fp32"](table, offsets)(features)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    _, exact_only = search.SCORERS["fp32"](table, offsets)(features)
    largest = lost.abs().amax(-1)
    assert (largest <= covering).all()
    assert (largest > exact_only).any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_does_not_change_codes(precision: search.Precision) -> None:
    features, table = near_codes("clusters")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(features, table, precision=precision), exact(features, table))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_that_are_not_finite_get_a_code(precision: search.Precision) -> None:
    features, table = near_codes("random")
    expected = nearest_codes(features, table)
    features[3], features[5, 2] = torch.nan, torch.inf
    codes = nearest_codes(features, table, precision=precision)
    expected[[3, 5]] = 0
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_does_not_grow_with_the_features(
    precision: search.Precision, largest_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BLOCK_SCORES", dict.fromkeys(PRECISIONS, 20_000))
    features, table = torch.randn(5000, 4), torch.randn(1000, 4)
    with largest_result:
        nearest_codes(features, table, precision=precision)
    assert largest_result.size <= 20_000  # the features and one block of scores, never 5,000,000
