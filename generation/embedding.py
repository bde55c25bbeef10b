"""Embeddings: the codes of an image position -> the input vector of a language model.

    embedding(codes)             all positions at once
    embedding(codes, cache)      the next positions, after those that `cache` has seen

`TokenEmbedding` reads rows of the model's own table (one code), `TableEmbedding` adds those of n
tables (LlamaGen), `TokenizerEmbedding` starts from the tokenizer's frozen codebooks (UniTok).

Shapes: B images, N positions, n codebooks, K codes of each, E width of the quantized vector, F of
the tokenizer's features, D of the language model.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from vqrae.common.distributed import FullPrecisionLinear, gathered
from vqrae.generation.decoding import KeyValues
from vqrae.tokenizer.projections import AttentionProjection

Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""New keys and values (B, heads, 1, width) -> those of all positions so far."""


class CodeEmbedding(Protocol):
    """What every embedding of codes offers."""

    def __call__(self, codes: Tensor, cache: Cache | None = None) -> Tensor:
        """Codes (B, N), or (B, N, n), -> vectors (B, N, D), each of a position and earlier ones."""

    def start(self, num_rows: int, num_codes: int) -> Cache | None:
        """An empty cache for that many images of N positions; None where vectors need none."""


class TokenEmbedding:
    """Codes (B, N) as ids of a language model: code c has row `offset + c` of its table."""

    def __init__(self, table: nn.Module, offset: int) -> None:
        self.table, self.offset = table, offset

    def __call__(self, codes: Tensor, cache: Cache | None = None) -> Tensor:
        return self.table(codes + self.offset)

    def start(self, num_rows: int, num_codes: int) -> None:
        return None


class TableEmbedding(nn.Module):
    """The sum of n learned tables (LlamaGen, arXiv 2406.06525, as UniTok trains it)."""

    def __init__(self, num_codebooks: int, codebook_size: int, width: int) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.tables = nn.Embedding(num_codebooks * codebook_size, width)

    def forward(self, codes: Tensor, cache: Cache | None = None) -> Tensor:
        first_rows = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        codes_BNn = codes.view(*codes.shape[:2], self.num_codebooks)
        return self.tables(codes_BNn + first_rows).sum(-2)

    def start(self, num_rows: int, num_codes: int) -> None:
        return None


class TokenizerEmbedding(nn.Module):
    """Frozen codebooks -> trained causal copy of the tokenizer's output projection -> MLP (UniTok).

    The causal projection looks at earlier positions. Sampling must therefore keep its keys and
    values; UniTok's own does not, and samples from other inputs than it was trained on.

    Args:
        code_vectors: the tokenizer's, (n, K, E / n) to be joined, or (n, K, E) to be added.
        projection: (B, N, E) -> (B, N, F), causal if it attends.
        feature_dim: F.
        width: D.
    """

    code_vectors: Tensor

    def __init__(
        self,
        code_vectors: Tensor,
        projection: FullPrecisionLinear | AttentionProjection,
        feature_dim: int,
        width: int,
    ) -> None:
        super().__init__()
        # A buffer, which no optimizer and no ZeRO partition touches.
        self.register_buffer("code_vectors", code_vectors)
        self.projection = projection
        attends = isinstance(projection, AttentionProjection)
        in_dim = projection.in_dim if attends else projection.in_features
        self.adds = code_vectors.shape[-1] == in_dim
        self.mlp = nn.Sequential(
            nn.LayerNorm(feature_dim, eps=1e-6),
            nn.Linear(feature_dim, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, codes: Tensor, cache: Cache | None = None) -> Tensor:
        options = {} if cache is None else {"cache": cache}
        # DeepSpeed trains weights of 16 bits, and leaves buffers as they are.
        quantized_BNE = self.quantized(codes).to(next(self.mlp.parameters()).dtype)
        return self.mlp(self.projection(quantized_BNE, **options))

    @torch.no_grad()
    def start_from(self, code_vectors: Tensor, projection: nn.Module) -> None:
        """Take codebooks (n, K, …), or (K, E), and output projection of a tokenizer."""
        own = self.code_vectors
        # Replaced, not copied into: DeepSpeed makes it in 16 bits.
        self.code_vectors = code_vectors.float().view_as(own).to(own.device, copy=True)
        weights = dict(projection.named_parameters())
        for name, weight in self.projection.named_parameters():
            with gathered(weight):
                weight.copy_(weights[name])

    def quantized(self, codes: Tensor) -> Tensor:
        """The tokenizer's vectors (B, N, E) of codes (B, N) or (B, N, n)."""
        num_codebooks = len(self.code_vectors)
        books = torch.arange(num_codebooks, device=codes.device)
        chosen_BNnE = self.code_vectors[books, codes.view(*codes.shape[:2], num_codebooks)]
        return chosen_BNnE.sum(-2) if self.adds else chosen_BNnE.flatten(-2)

    def start(self, num_rows: int, num_codes: int) -> Cache | None:
        projection = self.projection
        if not isinstance(projection, AttentionProjection):
            return None  # it sees one position
        heads = projection.num_heads
        width = max(projection.in_dim, projection.out_dim) // heads
        shape = (num_rows, heads, num_codes, width)
        return GrowingCache(KeyValues(1, shape, like=projection.q_bias))


class GrowingCache:
    """Keys and values of one layer, a position a call."""

    def __init__(self, store: KeyValues) -> None:
        self.store, self.filled = store, 0
        self.num_rows, self.num_slots = store.layers[0].shape[1], store.layers[0].shape[3]
        self.slots_N = torch.arange(self.num_slots, device=store.layers[0].device)

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slots_N[self.filled : self.filled + keys.shape[2]]
        self.filled += keys.shape[2]
        self.store.write_to(slots, rows=self.num_rows, length=self.filled)
        return self.store.update(keys, values, 0)
