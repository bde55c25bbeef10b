"""The search gives the exact nearest code, in any precision and any blocks, with bounded memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqrae.tokenizer.quantizers import search
from vqrae.tokenizer.quantizers.search import best_codes, nearest_codes
from vqrae.tokenizer.quantizers.simvq import SimVQ

PRECISIONS = ["fp32", "bf16"]
CASES = [
    "random", "clusters", "one cluster", "neighbouring floats", "copies", "outlier channel",
    "one huge code", "codes around the origin", "worst rounding", "features are codes",
]  # fmt: skip


def exact(features: Tensor, table: Tensor) -> Tensor:
    """The lowest of the codes at the smallest distance, by differences in float64."""
    distance = (features.double()[..., None, :] - table.double()).square().sum(-1)
    return (distance <= distance.amin(-1, keepdim=True) * (1 + 1e-12)).int().argmax(-1)


def near_codes(case: str) -> tuple[Tensor, Tensor]:
    """Features (200, E) and a table (160, E) on which a rounded product errs."""
    torch.manual_seed(0)
    features, table = torch.randn(200, 24), torch.randn(160, 24)
    chosen = torch.randint(160, (200,))
    if case == "clusters":  # ten codes within bf16 rounding of each other, and features among them
        table = (torch.randn(16, 1, 24) + 1e-3 * torch.randn(16, 10, 24)).flatten(0, 1)
        features = table[chosen] + 1e-3 * torch.randn(200, 24)
    elif case == "one cluster":  # more candidates than bf16 compares, within fp32's error
        table = torch.randn(24) + 1e-5 * torch.randn(160, 24)
        features = table[chosen] + 1e-5 * torch.randn(200, 24)
    elif case == "neighbouring floats":
        table = torch.randn(24).expand(160, 24).clone()
        for row in range(1, 160):
            number = table[row, row % 24]
            table[row, row % 24] = torch.nextafter(number, torch.tensor(row % 2 * 200.0 - 100))
        features = table[chosen] + torch.randn(200, 24)
    elif case == "copies":  # more of each than may be candidates
        table = table[:3].repeat(54, 1)[:160]
    elif case == "outlier channel":  # a common part a thousand times as large as what decides
        features[:, 3] += 1000
        table[:, 3] += 1000
    elif case == "one huge code":
        table[7] *= 1e4
    elif case == "codes around the origin":  # as plain VQ starts
        table *= 1e-4
    elif case == "worst rounding":  # everything loses half a bf16 step, in the direction of a code
        signs, ones = torch.randn(79, 257).sign(), torch.ones(1, 257)
        table = (1 + 0.99 * 2**-8) * torch.cat([ones, -ones, signs, -signs])
        features = torch.full((200, 257), 1 + 0.99 * 2**-8)
    elif case == "features are codes":
        features = table[chosen]
    return features, table


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_are_the_exact_ones(case: str, precision: search.Precision) -> None:
    features, table = near_codes(case)
    with torch.autocast("cpu", torch.bfloat16):  # which must not reach the search
        codes = nearest_codes(features, table, precision=precision)
    assert torch.equal(codes, exact(features, table))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scores", [50_000, 2**20])
def test_several_tables_at_once(
    precision: search.Precision, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BLOCK_SCORES_OF_TABLES", scores)
    parts = [near_codes(case) for case in CASES if case != "worst rounding"]  # of another width
    features = torch.stack([part for part, _ in parts], dim=1)
    tables = torch.stack([table for _, table in parts])
    codes = nearest_codes(features.view(4, 50, -1, 24), tables, precision=precision)
    expected = torch.stack([exact(*part) for part in parts], dim=1)
    assert torch.equal(codes, expected.view(4, 50, -1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", list(search.SCORERS))
def test_no_score_is_further_off_than_its_slack(case: str, name: str) -> None:
    features, table = near_codes(case)
    offsets = table.double().square().sum(-1) / 2
    scores, slack = search.SCORERS[name](table, offsets)(features)
    error = scores.double() - (features.double() @ table.double().T - offsets)
    # The shift that all codes of a feature share is unknown; some shift must fit every error.
    assert ((error.amax(-1) - error.amin(-1)) / 2 <= slack).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_features_at_width(precision: search.Precision) -> None:
    torch.manual_seed(0)
    features, table = torch.randn(2, 150, 256), torch.randn(1000, 256)
    codes = nearest_codes(features, table, precision=precision)
    assert torch.equal(codes, torch.cdist(features.double(), table.double()).argmin(-1))
    plain = (features.bfloat16() @ table.bfloat16().T - table.square().sum(-1) / 2).argmax(-1)
    assert not torch.equal(plain, codes)  # what bf16 alone would give


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scores", [1, 1000, 2**22])
@pytest.mark.parametrize("codebook_size", [1, 129])
def test_blocks_do_not_matter(
    precision: search.Precision, scores: int, codebook_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BLOCK_SCORES", dict.fromkeys(PRECISIONS, scores))
    features, table = near_codes("clusters")
    table = table[:codebook_size]
    assert torch.equal(nearest_codes(features, table, precision=precision), exact(features, table))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_largest_product_and_features_that_are_not_finite(precision: search.Precision) -> None:
    features, table = near_codes("random")
    expected = (features.double() @ table.double().T).argmax(-1)
    features[3], features[5, 2] = torch.nan, torch.inf
    expected[[3, 5]] = 0
    offsets = torch.zeros(160, dtype=torch.float64)
    assert torch.equal(best_codes(features, table, offsets, precision=precision), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_does_not_grow_with_the_features(
    precision: search.Precision, largest_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BLOCK_SCORES", dict.fromkeys(PRECISIONS, 20_000))
    features, table = torch.randn(5000, 4), torch.randn(1000, 4)
    with largest_result:
        nearest_codes(features, table, precision=precision)
    assert largest_result.size <= 20_000  # the features and one block of scores, never 5,000,000


# ---- products


class SettingsAtProducts(TorchDispatchMode):
    """What PyTorch allows fp32 products to lose, at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.add(allowed())
        return func(*args, **(kwargs or {}))


def allowed() -> tuple[str, str]:
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


@pytest.fixture(params=["older switch", "newer switch", "switch of all", "medium"])
def shortened_products(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Each of PyTorch's ways to allow TF32 or bf16 in fp32 products."""
    backends: Any = torch.backends
    ways = {
        "older switch": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
        "newer switch": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
        "switch of all": lambda: setattr(backends, "fp32_precision", "tf32"),
        "medium": lambda: torch.set_float32_matmul_precision("medium"),
    }
    ways[request.param]()
    yield allowed()
    torch.set_float32_matmul_precision("highest")
    for part in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
        part.fp32_precision = "none"


@pytest.mark.parametrize("training", [False, True])
def test_the_search_and_its_table_are_fp32_whatever_is_allowed_outside(
    training: bool, shortened_products: tuple[str, str]
) -> None:
    quantizer = SimVQ(16, 4).train(training)
    with SettingsAtProducts() as settings, torch.no_grad():
        quantizer(torch.randn(1, 3, 4))
    assert settings.seen == {("ieee", "ieee")}
    assert allowed() == shortened_products
