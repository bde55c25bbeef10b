"""The codebook in training: where it starts, how much of it is used, what becomes of unused codes.

Shapes: B batch, H W pixels, N visual tokens, E codebook width, n codebooks of K codes with vectors
of width w, M sampled images or features.
"""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel, VQRAEOutput
from vqrae.tokenizer.quantizers.base import CodebookQuantizer
from vqrae.tokenizer.quantizers.kmeans import draw_by_error
from vqrae.tokenizer.quantizers.search import exact_products

# -------------------------------------------------------------------------------------------- start


def sample_size(config: VQRAEConfig) -> int:
    """Images that the functions below should see: 32 features per code, and at least 256 images."""
    return max(256, -(-32 * config.codebook_size // config.grid_size**2))


def require_images_for_codebook(config: VQRAEConfig, count: int) -> None:
    """Refuse to start K codes from `count` images that have fewer tokens.

    Raises:
        ValueError: with the number of images needed, and the settings that need none.
    """
    codes, tokens = config.codebook_size, config.grid_size**2
    if count * tokens < codes:
        raise ValueError(
            f"got {count} images of {tokens} tokens to start {codes} codes from, expected at least "
            f"{-(-codes // tokens)} images: give more, or set a smaller model.codebook_size, or "
            "model.codebook_init=random and bypass_steps=0"
        )


@torch.no_grad()
def standardize_features(model: VQRAEModel, images: Tensor, batch_size: int = 64) -> None:
    """Measure the channel statistics of the features of images (M, 3, H, W) in [0, 1]."""
    batches = [model.encode_fused(batch).float() for batch in images.split(batch_size)]
    features = torch.cat(batches).flatten(0, 1)
    model.feature_mean.copy_(features.mean(0))
    model.feature_std.copy_(features.std(0).clamp(min=1e-6))
    if isinstance(model.in_proj, nn.Linear):
        # An isometry into the code space keeps the distances between features.
        nn.init.orthogonal_(model.in_proj.weight)
        model.in_proj.bias.zero_()


@torch.no_grad()
def initialize_codebook(
    model: VQRAEModel, images: Tensor, batch_size: int = 64, start: str = "features"
) -> None:
    """Start the codebook from the projected features of images (M, 3, H, W) in [0, 1].

    Args:
        start: `features`: their k-means centres; `gaussian`: random vectors with their mean and
            covariance.

    Raises:
        ValueError: when the quantizer has no codebook, or the images have fewer than K tokens.
    """
    quantizer = model.quantizer
    if not isinstance(quantizer, CodebookQuantizer):
        raise ValueError(
            f"quantizer {model.config.quantizer} has no codebook that could start from features"
        )
    require_images_for_codebook(model.config, len(images))
    batches = [model.project(model.encode_fused(batch)) for batch in images.split(batch_size)]
    with torch.autocast(images.device.type, enabled=False):
        features_ME = torch.cat(batches).flatten(0, 1)
        if start == "gaussian":
            variances, axes_EE = torch.linalg.eigh(features_ME.T.cov())
            random_KE = torch.randn(quantizer.codebook_size, len(axes_EE), device=images.device)
            scaled_KE = random_KE * variances.clamp(min=0).sqrt()
            # As many as there are codes: k-means leaves them where they are.
            features_ME = features_ME.mean(0) + scaled_KE @ axes_EE.T
        quantizer.initialize_from(features_ME)


def measure_in_pixels(
    model: VQRAEModel, images: Tensor, *, num_probes: int = 4, batch_size: int = 16
) -> None:
    """Give the code space a basis in which distances are, to first order, those of decoded images.

    The nearest code is then the one that differs least in what the decoder looks at. Without
    quantization the model stays the same function, because the projections on both sides change
    together. The metric is the mean of J'J over tokens, where J is the derivative of the image by a
    projected feature; it is estimated from products of J' with random images.

    Args:
        images: (M, 3, H, W) in [0, 1].
    """
    in_proj, out_proj = model.in_proj, model.out_proj
    assert isinstance(in_proj, nn.Linear), "checked before training (check_quantizer)"
    assert isinstance(out_proj, nn.Linear), "as in_proj"
    device, width = images.device, model.config.codebook_dim
    generator = torch.Generator(device).manual_seed(0)
    # Encoder and decoder follow the caller's autocast; the metric and both projections are fp32.
    full_precision = torch.autocast(device.type, enabled=False)
    metric_EE = torch.zeros(width, width, device=device)
    scatter_EE = torch.zeros(width, width, device=device)
    for batch in images.split(batch_size):
        projected_BNE = model.project(model.encode_fused(batch)).detach().requires_grad_()
        with full_precision:
            hidden = out_proj(projected_BNE)
        decoded = model.decode_pixels(hidden)
        for _ in range(num_probes):
            probe = torch.randn(decoded.shape, generator=generator, device=device)
            (gradient,) = torch.autograd.grad(decoded, projected_BNE, probe, retain_graph=True)
            with full_precision:
                metric_EE = metric_EE + torch.einsum("bne,bnf->ef", gradient, gradient)
        centred = projected_BNE.detach() - projected_BNE.detach().mean((0, 1))
        with full_precision:
            scatter_EE = scatter_EE + torch.einsum("bne,bnf->ef", centred, centred)
    # TF32 in one of the two products would no longer cancel the other.
    with torch.no_grad(), full_precision, exact_products():
        values, axes = torch.linalg.eigh(metric_EE)
        values = values.clamp(min=1e-6 * values[-1])
        values = values * (scatter_EE.trace() / (metric_EE @ scatter_EE).trace())  # keep variance
        root = (axes * values.sqrt()) @ axes.T
        inverse = (axes * values.rsqrt()) @ axes.T
        in_proj.weight.copy_(root @ in_proj.weight)
        in_proj.bias.copy_(root @ in_proj.bias)
        out_proj.weight.copy_(out_proj.weight @ inverse)


# ---------------------------------------------------------------------------------------------- use


class CodeUsage:
    """Counts (n, K) of the codes of each codebook since the last `clear`."""

    def __init__(
        self, codebook_size: int, num_codebooks: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        shape = (num_codebooks, codebook_size)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._firsts = codebook_size * torch.arange(num_codebooks, device=device)

    def update(self, codes: Tensor) -> None:
        """Count codes (...), or (..., n) of several codebooks; no host synchronisation."""
        flat = (codes.reshape(-1, len(self.counts)) + self._firsts).flatten()
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat))

    def gather(self, engine: Accelerator) -> None:
        """Replace the counts on every process by their sum over all processes."""
        self.counts = engine.reduce(self.counts)

    def clear(self) -> None:
        """Start a new window."""
        self.counts.zero_()

    def summary(self) -> dict[str, float]:
        """Figures for the log.

        Returns:
            codebook_usage: share of the codes that occurred.
            codebook_usage_min: that of the codebook with the smallest, of several.
            codebook_perplexity: exp of the entropy of a codebook's codes, in the mean over
            codebooks: as many codes in equal use would have it.
        """
        usages = (self.counts > 0).float().mean(-1)
        row = {"codebook_usage": usages.mean().item()}
        if len(usages) > 1:
            row["codebook_usage_min"] = usages.min().item()
        return row | {"codebook_perplexity": self.entropies().exp().mean().item()}

    def shares(self) -> dict[str, np.ndarray]:
        """How often each code (K,) of each codebook was chosen; 1 is equal use."""
        counts = self.counts.double()
        relative = counts / counts.mean(-1, keepdim=True).clamp(min=1e-12)
        names = [f"code_use_{i}" if len(counts) > 1 else "code_use" for i in range(len(counts))]
        return dict(zip(names, relative.cpu().numpy(), strict=True))

    def entropies(self) -> Tensor:
        """Of the codes of each codebook (n,), in nats."""
        share = self.counts.double() / self.counts.sum(-1, keepdim=True).clamp(min=1)
        return -torch.special.xlogy(share, share).sum(-1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["counts"])


@torch.no_grad()
def code_space(model: VQRAEModel, features: Tensor) -> dict[str, float]:
    """Figures for the log on where codes are and where fused features (B, N, D) are; none of a
    quantizer without one table of code vectors.

    The features are a sample, the newest micro-batch of one process: unlike the rest of the log,
    these figures depend on how a batch is divided.

    Returns:
        feature_spread: root mean square distance of projected features from their mean.
        code_spread: that of the codes, by feature_spread.
        code_offset: distance of both means, by feature_spread.
        code_error: share of the features' variance that is lost by quantizing them.
        feature_rank, code_rank: dimensions that they extend in, (sum of variances)^2 / sum of
            squares.
    """
    quantizer = model.quantizer
    if not isinstance(quantizer, CodebookQuantizer) or quantizer.num_codebooks > 1:
        return {}
    features_ME = quantizer.to_code_space(model.project(features).flatten(0, 1))
    codes_KE = quantizer.code_vectors()
    chosen_ME = codes_KE[quantizer.choose(features_ME[None], codes_KE)[0]]
    covariances = [points.T.cov(correction=0) for points in (features_ME, codes_KE)]
    variance, code_variance = (covariance.trace() for covariance in covariances)
    ranks = [each.trace().square() / each.square().sum() for each in covariances]
    figures = {
        "feature_spread": variance.sqrt(),
        "code_spread": (code_variance / variance).sqrt(),
        "code_offset": (features_ME.mean(0) - codes_KE.mean(0)).norm() / variance.sqrt(),
        "code_error": (features_ME - chosen_ME).square().sum(-1).mean() / variance,
        "feature_rank": ranks[0],
        "code_rank": ranks[1],
    }
    return {name: figure.item() for name, figure in figures.items()}


@torch.no_grad()
def reinitialize_unused_codes(
    model: VQRAEModel, output: VQRAEOutput, usage: CodeUsage, engine: Accelerator, *, seed: int
) -> int:
    """Move every code that `usage` did not see onto what its codebook expressed badly.

    Args:
        output: of the newest batch, whose features are candidates.
        usage: since the last call, summed over all processes here; it is cleared.

    Returns:
        The number of codes moved, equal on all processes. Counting them makes the host wait.
    """
    quantizer = model.quantizer
    assert isinstance(quantizer, CodebookQuantizer), "checked before training (check_quantizer)"
    usage.gather(engine)
    unused = (usage.counts.flatten() == 0).nonzero().flatten()
    numbers = (usage.counts == 0).sum(-1).tolist()
    usage.clear()
    if len(unused) > 0:
        features = model.project(output.fused).flatten(0, 1)
        targets_nMw, errors_nM = quantizer.targets(features, output.codes.flatten(0, 1))
        generator = torch.Generator(features.device).manual_seed(seed)
        vectors = []
        for targets_Mw, errors_M, number in zip(targets_nMw, errors_nM, numbers, strict=True):
            if number > 0:
                vectors.append(targets_Mw[draw_by_error(errors_M, number, generator)])
        # Each process chose among its own images: all take the main one's choice.
        quantizer.reinitialize(unused, broadcast(torch.cat(vectors)))
    return len(unused)
