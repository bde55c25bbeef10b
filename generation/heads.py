"""Prediction heads: from a language model's state to the codes of the next image position.

    head.loss(hidden, codes)     training, codes known
    head.sample(hidden, draw)    sampling; guidance and filters are the caller's `draw`

`SingleCodeHead` reads one code off the rows of `lm_head` (VQRAE). `DepthHead` predicts n codes one
after the other with a small decoder of its own (UniTok, arXiv 2502.20321, section 3.4).

Shapes: M positions, R rows of a batch (with guidance twice the images B), D width, n codebooks, K
codes of each.
"""

import copy
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from vqrae.generation.decoding import CachedRows

Draw = Callable[[int, Tensor], Tensor]
"""(number of the codebook, its logits (R, K) in fp32) -> codes (B,), which R / B rows share."""


class VisualHead(Protocol):
    """What every prediction head offers."""

    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Mean loss of codes (M,), or (M, n), given final-normed states (M, D)."""

    def sample(self, hidden: Tensor, draw: Draw, steps: CachedRows | None = None) -> Tensor:
        """Codes (B,), or (B, n), of the next position given final-normed states (R, D).

        Args:
            steps: what `start` returned, to allocate its buffers once for all positions.
        """

    def start(self, num_rows: int, *, compile: bool = False) -> CachedRows | None:
        """Buffers for sampling that many rows."""


class SingleCodeHead(nn.Linear):
    """An `lm_head` that computes the logits of some rows only; weight, key and tying stay.

    A module, because ZeRO-3 gathers a weight around the forward pass of the module that owns it.
    """

    def __init__(self, head: nn.Linear, rows: slice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.rows = head.weight, rows
        self.register_parameter("bias", None)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight[self.rows])

    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return F.cross_entropy(self(hidden).float(), codes)

    def sample(self, hidden: Tensor, draw: Draw, steps: CachedRows | None = None) -> Tensor:
        return draw(0, self(hidden).float())

    def start(self, num_rows: int, *, compile: bool = False) -> None:
        return None


class ZeroLinear(nn.Linear):
    """A linear layer whose weight starts at zero, by the rules of the model that holds it."""


class DepthHead(nn.Module):
    """A small decoder over the n codes of one position: state, E1(code 1), … E(n-1)(code n-1).

    Args:
        config: of the language model; the layers of the head are of its class and width.
        num_layers: of the head.
        positions: RoPE positions 0 … n - 1; off, as LlamaGen's form has it, order is known by the
            code embeddings and the causal mask alone.
        z_loss: weight of the mean squared largest logit, which keeps logits from drifting.
        zero_start: the classifier's weight starts at zero.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        num_codebooks: int,
        codebook_size: int,
        *,
        num_layers: int = 3,
        positions: bool = True,
        z_loss: float = 5e-5,
        zero_start: bool = False,
    ) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.positions, self.z_loss = positions, z_loss
        # Eight positions gain nothing from flash attention, which takes no mask of ours.
        attention = "eager" if config._attn_implementation == "eager" else "sdpa"
        self.decoder = AutoModel.from_config(
            depth_config(config, num_layers), attn_implementation=attention
        )
        del self.decoder.embed_tokens
        width = config.hidden_size
        self.embedding = None
        if num_codebooks > 1:
            # One table for E1 … E(n-1): one lookup.
            self.embedding = nn.Embedding((num_codebooks - 1) * codebook_size, width)
        self.classifier = (ZeroLinear if zero_start else nn.Linear)(width, codebook_size)

    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Mean cross entropy of codes (M, n) given states (M, D), and the z-loss."""
        logits_MnK = self(hidden, codes)
        loss = F.cross_entropy(logits_MnK.flatten(0, 1), codes.flatten())
        return loss + self.z_loss * logits_MnK.amax(-1).square().mean()

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Logits (M, n, K) in fp32 of all codes (M, n) at once, each given the ones before it."""
        codes = codes.view(len(hidden), self.num_codebooks)
        inputs_MnD = hidden[:, None]
        if self.embedding is not None:
            first_rows = torch.arange(self.num_codebooks - 1, device=codes.device)
            following = self.embedding(codes[:, :-1] + first_rows * self.codebook_size)
            inputs_MnD = torch.cat([inputs_MnD, following.to(hidden.dtype)], dim=1)
        places = torch.arange(self.num_codebooks, device=codes.device)
        # A mask of our own: transformers would take equal positions for packed sequences.
        blocked = torch.finfo(hidden.dtype).min
        mask = (places > places[:, None]).to(hidden.dtype) * blocked
        output = self.decoder(
            inputs_embeds=inputs_MnD,
            attention_mask=mask[None, None],
            position_ids=(places * self.positions)[None],
            use_cache=False,
        )
        return self.classifier(output.last_hidden_state).float()

    def sample(self, hidden: Tensor, draw: Draw, steps: CachedRows | None = None) -> Tensor:
        steps = self.start(len(hidden)) if steps is None else steps
        steps.restart()
        inputs_RD, codes = hidden, []
        for place in range(self.num_codebooks):
            logits_RK = self.classifier(steps.feed(inputs_RD)).float()
            codes.append(draw(place, logits_RK))
            if self.embedding is not None and place < self.num_codebooks - 1:
                rows_BD = self.embedding(codes[-1] + place * self.codebook_size)
                inputs_RD = rows_BD.to(hidden.dtype).repeat(len(hidden) // len(rows_BD), 1)
        return torch.stack(codes, dim=1) if self.num_codebooks > 1 else codes[0]

    def start(self, num_rows: int, *, compile: bool = False) -> CachedRows:
        return CachedRows(
            self.decoder, num_rows, self.num_codebooks, positions=self.positions, compile=compile
        )


def depth_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The configuration of a language model with another number of layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = num_layers, 1
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * num_layers
    return config
