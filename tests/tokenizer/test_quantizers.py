"""What holds for every quantizer, and what each promises by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqrae.common import distributed
from vqrae.tokenizer.quantizers import ibq, search
from vqrae.tokenizer.quantizers.base import CodebookQuantizer, Quantizer
from vqrae.tokenizer.quantizers.fsq import FSQ
from vqrae.tokenizer.quantizers.ibq import IBQ
from vqrae.tokenizer.quantizers.kmeans import draw_by_error, kmeans
from vqrae.tokenizer.quantizers.projection import ProjectedRows
from vqrae.tokenizer.quantizers.registry import QUANTIZERS, build_quantizer
from vqrae.tokenizer.quantizers.search import nearest_codes
from vqrae.tokenizer.quantizers.simvq import SimVQ

WITH_CODEBOOK = [name for name in QUANTIZERS if name != "fsq"]
TAKEN = torch.tensor(True)
BOTH = {"codebook_loss", "commitment_loss"}
LOSSES = {"ema_vq": {"commitment_loss"}, "fsq": set(), "ibq": {*BOTH, "index_loss"}}
SEVERAL = {"mcq": 4, "rvq": 3}  # codebooks


def make(name: str, **options: Any) -> Any:
    """A random quantizer with 32 codes of width 16, or of width 2 where levels make the codes."""
    torch.manual_seed(0)
    if name == "fsq":
        return build_quantizer(name, 32, 2, levels=[4, 8])
    options.setdefault("num_codebooks", SEVERAL.get(name, 1))
    return build_quantizer(name, 32, 16, **options)


def features_for(quantizer: Quantizer, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, quantizer.codebook_dim, generator=generator)


# ---- what holds for all


@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract(name: str) -> None:
    quantizer = make(name).eval()
    features = features_for(quantizer, 2, 9)
    output = quantizer(features)
    several = (SEVERAL[name],) if name in SEVERAL else ()
    assert (output.codes.shape, output.codes.dtype) == ((2, 9, *several), torch.int64)
    assert torch.equal(quantizer.lookup(output.codes), output.quantized)
    assert output.quantized.shape == features.shape
    assert output.losses.keys() == LOSSES.get(name, BOTH)  # each has a weight of that name
    assert all(loss.shape == () for loss in output.losses.values())
    vectors = quantizer.code_vectors()
    assert vectors.shape[:-1] == (*several, 32)
    assert vectors.unique(dim=-2).shape == vectors.shape
    alone = quantizer(features[1:])
    assert torch.equal(alone.codes, output.codes[1:])  # whatever else is in the batch
    if isinstance(quantizer, CodebookQuantizer):
        targets, errors = quantizer.targets(features[0], output.codes[0])
        left = quantizer.to_code_space(features[0]) - output.quantized[0]
        last = errors.sum(0) if name == "mcq" else errors[-1]
        torch.testing.assert_close(last, left.square().sum(-1))
        assert targets.shape == (quantizer.num_codebooks, 9, vectors.shape[-1])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_feature_that_is_not_a_number_has_a_code_and_shows_in_the_output(name: str) -> None:
    quantizer = make(name).train()
    features = features_for(quantizer, 1, 5)
    features[0, 2] = torch.nan
    output = quantizer(features)
    assert 0 <= output.codes.min() <= output.codes.max() < 32  # counted before the step is skipped
    if name != "ibq":  # whose output is the code itself
        assert output.quantized[0, 2].isnan().all()
    assert all(loss.isnan() for loss in output.losses.values())


@pytest.mark.parametrize("name", WITH_CODEBOOK)
def test_search_precision_changes_no_code(name: str) -> None:
    fast, exact = make(name, search="bf16").eval(), make(name).eval()
    features = features_for(exact, 20, 30)
    assert torch.equal(fast(features).codes, exact(features).codes)


@pytest.mark.parametrize("name", ["simvq", "vq", "ema_vq", "rvq"])
def test_gradients_go_where_they_belong(name: str) -> None:
    quantizer = make(name).train()
    features = features_for(quantizer, 2, 9).requires_grad_()
    weights = torch.randn(2, 9, 16)
    (quantizer(features).quantized * weights).sum().backward()
    torch.testing.assert_close(features.grad, weights)  # straight through, unchanged
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())
    if name != "ema_vq":
        features.grad = None
        quantizer(features).losses["codebook_loss"].backward()
        assert features.grad is None  # moves codes only
        assert any(p.grad is not None and p.grad.any() for p in quantizer.parameters())
    quantizer.zero_grad()
    quantizer(features).losses["commitment_loss"].backward()
    assert features.grad.any()  # moves features only
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())


@pytest.mark.parametrize("name", WITH_CODEBOOK)
def test_start_from_features_and_unused_codes(name: str) -> None:
    quantizer = make(name).eval()
    features = 3 + 2 * features_for(quantizer, 500)
    with torch.no_grad():
        quantizer.initialize_from(features)
        if name != "ibq":  # whose choice is not the nearest code
            for codes in quantizer(features[None]).codes.view(500, -1).T:
                assert codes.unique().numel() == 32
        unused = torch.tensor([3, 32 * quantizer.num_codebooks - 1])  # of the first and the last
        width = quantizer.code_vectors().shape[-1]
        expected = torch.full((2, width), 9.0) + torch.eye(2, width)
        quantizer.reinitialize(unused, expected)
        if name in ("l2_vq", "mcq"):
            expected = nn.functional.normalize(expected, dim=-1)
        found = quantizer.code_vectors().flatten(0, -2)[unused]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="expected at least as many"):
        quantizer.initialize_from(features[:31])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simqv", {}, "Did you mean 'simvq'"),
        ("ema_vq", {"decays": 0.9}, r"options\.decays: unknown option of ema_vq.* 'decay'"),
        ("ema_vq", {"decay": 1.0}, r"decay: got 1\.0"),
        ("fsq", {}, r"quantizer_options\.levels is required by fsq"),
        ("fsq", {"levels": [4, 8]}, "make codebook_size=32 and codebook_dim=2"),
        ("fsq", {"levels": [8, 1]}, "expected at least 2"),
        ("vq", {"search": "fp16"}, "search: got 'fp16'"),
        ("vq", {"num_codebooks": 2}, r"got 2 for quantizer vq.*of \['mcq', 'rvq'\]"),
        ("mcq", {"num_codebooks": 3}, "codebook_dim: got 4 for num_codebooks=3"),
    ],
)
def test_names_and_options_are_checked(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_quantizer(name, 8, 4, **options)


# ---- simvq


def plain_rows(quantizer: SimVQ, codes: Tensor) -> Tensor:
    return nn.functional.embedding(codes, quantizer.projection(quantizer.codebook))


@pytest.mark.parametrize("train_codebook", [False, True])
@pytest.mark.parametrize("tokens", [5, 100])  # fewer and more than codes
def test_simvq_gradient_equals_that_of_the_whole_table(tokens: int, train_codebook: bool) -> None:
    quantizer = make("simvq", train_codebook=train_codebook).train()
    codes, weights = torch.randint(32, (2, tokens)), torch.randn(2, tokens, 16)
    (plain_rows(quantizer, codes) * weights).sum().backward()
    expected = [p.grad.clone() for p in quantizer.parameters()]
    quantizer.zero_grad()
    trained = (quantizer.codebook, quantizer.projection.weight, quantizer.projection.bias)
    total = (ProjectedRows.apply(quantizer.table(), codes, *trained) * weights).sum()
    with torch.autocast("cpu", torch.bfloat16):  # as in the loop; it must not reach the gradient
        total.backward()
    assert len(expected) == 2 + train_codebook
    for p, gradient in zip(quantizer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_simvq_projects_its_table_once_in_evaluation() -> None:
    quantizer = make("simvq").eval()
    calls: list[None] = []
    quantizer.projection.register_forward_hook(lambda *_: calls.append(None))
    features = features_for(quantizer, 1, 5)
    with torch.no_grad():
        for _ in range(3):
            quantizer.lookup(quantizer(features).codes)
    assert len(calls) == 1
    quantizer.train()
    for _ in range(3):
        quantizer(features)
    assert len(calls) == 4


def test_simvq_notices_every_change_of_its_weights() -> None:
    quantizer = make("simvq").eval()
    codes = torch.arange(32)

    @torch.no_grad()
    def check() -> None:
        torch.testing.assert_close(quantizer.lookup(codes), plain_rows(quantizer, codes))

    check()
    with torch.no_grad():
        quantizer.projection.bias += 1
        check()
        quantizer.codebook[3] = 7
        check()
    for assign in (False, True):
        quantizer.load_state_dict(SimVQ(32, 16).state_dict(), assign=assign)
        check()
    quantizer.train()
    quantizer.projection.weight.data.mul_(2)  # as an engine does, unseen by version counters
    check()
    quantizer.eval()
    check()
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2, fused=True)  # as unseen
    quantizer(features_for(quantizer, 1, 5)).losses["codebook_loss"].backward()
    optimizer.step()
    check()
    quantizer.double()
    check()


# ---- ema_vq


def test_ema_follows_the_decayed_mean() -> None:
    quantizer = make("ema_vq", decay=0.9).train()
    features = features_for(quantizer, 4, 50)
    before, codes = quantizer.codebook.clone(), quantizer(features).codes
    assert torch.equal(quantizer.codebook, before)  # not before the step is done
    quantizer.after_step(TAKEN)
    for k in range(32):
        chosen = features[codes == k]
        size = 0.9 + 0.1 * len(chosen)
        mean = (0.9 * before[k] + 0.1 * chosen.sum(0)) / size if len(chosen) else before[k]
        torch.testing.assert_close(quantizer.codebook[k], mean)
        torch.testing.assert_close(quantizer.cluster_size[k].item(), size)


def test_ema_code_that_nothing_chooses_stays() -> None:
    quantizer = make("ema_vq", decay=0.5).train()
    with torch.no_grad():
        quantizer.codebook[5] = 100
    features = features_for(quantizer, 1, 50)
    for _ in range(300):  # until its weight is 0
        quantizer(features)
        quantizer.after_step(TAKEN)
    assert quantizer.cluster_size[5] == 0
    assert (quantizer.codebook[5] == 100).all()
    assert quantizer.codebook.isfinite().all()
    with torch.no_grad():
        quantizer.reinitialize(torch.tensor([5]), features[0, :1])
    assert quantizer(features).codes[0, 0] == 5
    quantizer.after_step(TAKEN)
    assert quantizer.codebook[5].abs().max() < 10  # old statistics would pull it back


@pytest.mark.parametrize(("name", "options"), [("ema_vq", {}), ("simvq", {"rate_weight": 0.1})])
def test_running_means_stay_when_the_step_is_skipped(name: str, options: dict[str, float]) -> None:
    quantizer = make(name, **options).train()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    features = features_for(quantizer, 1, 50)
    features[0, 3] = torch.nan
    quantizer(features)
    quantizer.after_step(~TAKEN)
    torch.testing.assert_close(quantizer.state_dict(), before, atol=0, rtol=0)
    quantizer(features_for(quantizer, 1, 50))
    quantizer.after_step(TAKEN)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())
    quantizer.eval()(features)  # evaluation changes nothing
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.after_step(TAKEN)
    torch.testing.assert_close(quantizer.state_dict()["codebook"], before["codebook"])


def test_ema_micro_batches_and_processes_equal_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, first, second = (make("ema_vq").train() for _ in range(4))
    features = features_for(whole, 4, 50)
    whole(features)
    whole.after_step(TAKEN)
    for part in features.split(1):
        parts(part)
    parts.after_step(TAKEN)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())
    first(features[:1])
    second(features[1:])
    reductions = []

    def all_reduce(tensor: Tensor) -> None:
        reductions.append(tensor.shape)
        tensor.add_(second._sums)

    monkeypatch.setattr(distributed.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.torch.distributed, "all_reduce", all_reduce)
    first.after_step(TAKEN)
    assert reductions == [(32, 17)]  # sums and counts together
    torch.testing.assert_close(first.state_dict(), whole.state_dict())


# ---- l2_vq


def test_l2_vq_lives_on_the_sphere() -> None:
    quantizer = make("l2_vq").eval()
    features = features_for(quantizer, 2, 50)
    output = quantizer(features)
    torch.testing.assert_close(output.quantized.norm(dim=-1), torch.ones(2, 50))
    cosine = nn.functional.cosine_similarity(features[:, :, None], quantizer.codebook, dim=-1)
    assert torch.equal(output.codes, cosine.argmax(-1))
    features.requires_grad_()
    quantizer.train()(features).quantized[..., 0].sum().backward()
    # The length of a feature has no effect.
    assert (features.grad * features).sum(-1).abs().max() < 1e-5


# ---- ibq


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibq, "BLOCK_LOGITS", 32 * 7)
    monkeypatch.setattr(search, "BLOCK_SCORES", {"fp32": 32 * 7})


@pytest.mark.usefixtures("small_blocks")
def test_ibq_gradient_equals_the_formula() -> None:
    quantizer = IBQ(32, 16).train()
    with torch.no_grad():
        quantizer.codebook.normal_(std=0.3)
    features, weights = features_for(quantizer, 2, 30).requires_grad_(), torch.randn(2, 30, 16)
    logits = features @ quantizer.codebook.T
    soft = logits.softmax(-1)
    hard = nn.functional.one_hot(logits.argmax(-1), 32).to(soft)
    expected = (soft + (hard - soft).detach()) @ quantizer.codebook
    trained = (features, quantizer.codebook)
    wanted = torch.autograd.grad((expected * weights).sum(), trained)
    output = quantizer(features)
    torch.testing.assert_close(output.quantized, expected)
    assert torch.equal(output.quantized, quantizer.lookup(output.codes))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((output.quantized * weights).sum(), trained)
    torch.testing.assert_close(found, wanted)
    assert (found[1] != 0).all()  # every code, chosen or not


@pytest.mark.usefixtures("small_blocks")
def test_ibq_entropy_equals_the_formula() -> None:
    features = torch.randn(2, 30, 16, requires_grad=True)
    table = torch.randn(32, 16, requires_grad=True)
    soft = (features @ table.T / 2.0).softmax(-1).flatten(0, -2)
    mean = soft.mean(0)
    expected = (mean * mean.log()).sum() - (soft * soft.log()).sum(-1).mean()
    found = ibq.entropy_loss(features, table, 2.0)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, (features, table))
    torch.testing.assert_close(torch.autograd.grad(found, (features, table)), wanted)
    # Probabilities that vanish have a gradient.
    for gradient in torch.autograd.grad(ibq.entropy_loss(features, table, 0.01), (features, table)):
        assert gradient.isfinite().all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("entropy", [False, True])
def test_ibq_memory_does_not_grow_with_the_features(entropy: bool, largest_result: Any) -> None:
    quantizer = make("ibq").train()
    quantizer.compute_entropy = entropy
    features = features_for(quantizer, 2, 500).requires_grad_()
    with largest_result:
        output = quantizer(features)
        (output.quantized.sum() + sum(output.losses.values())).backward()
    assert ("entropy_loss" in output.losses) == entropy
    assert largest_result.size == features.numel()  # 16,000 numbers, where all logits are 32,000


# ---- fsq


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 4), (8, 8, 8, 8, 4)])
def test_fsq_reaches_every_level_and_leaves_none(levels: tuple[int, ...]) -> None:
    size, width = int(torch.tensor(levels).prod()), len(levels)
    quantizer = FSQ(size, width, levels=levels).eval()
    vectors = quantizer.lookup(torch.arange(size))
    assert vectors.unique(dim=0).shape == vectors.shape
    assert vectors.abs().max() == 1
    extremes = torch.cartesian_prod(*[torch.tensor([-50.0, 0.0, 50.0])] * width).view(1, -1, width)
    output = quantizer(extremes)
    assert (output.codes.min(), output.codes.max()) == (0, size - 1)
    assert (output.quantized[0, output.quantized.shape[1] // 2] == 0).all()  # 0 stays 0
    ramp = torch.linspace(-20, 20, 2001)[:, None].expand(-1, width)
    channels = quantizer(ramp[None]).quantized[0].T
    assert [channel.unique().numel() for channel in channels] == list(levels)


def test_fsq_gradient_passes_through_the_rounding() -> None:
    quantizer = make("fsq").train()
    features = features_for(quantizer, 1, 50).requires_grad_()
    quantizer(features).quantized.sum().backward()
    found, features.grad = features.grad.clone(), None
    quantizer.to_code_space(features).sum().backward()
    torch.testing.assert_close(found, features.grad)
    assert not isinstance(quantizer, CodebookQuantizer)  # nothing to start or to re-initialise
    assert quantizer.state_dict() == {}


# ---- kmeans


def test_kmeans_finds_clusters_and_leaves_no_centre_empty() -> None:
    torch.manual_seed(0)
    truth = 10 * torch.randn(20, 8)
    features = (truth[:, None] + 0.1 * torch.randn(20, 50, 8)).flatten(0, 1)

    def error(centers: Tensor) -> Tensor:
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
