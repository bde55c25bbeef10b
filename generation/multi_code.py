"""A language model that reads and predicts several codes a position (UniTok, arXiv 2502.20321).

It holds any causal language model of transformers, an embedding of codes and a prediction head, and
is saved as one folder. Images of one code a position need none of this: see `modeling`.

Shapes: B images, T ids of a prompt, N positions, n codebooks, D width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from vqrae.common.distributed import FullPrecisionLinear
from vqrae.generation.embedding import (
    CodeEmbedding,
    TableEmbedding,
    TokenEmbedding,
    TokenizerEmbedding,
)
from vqrae.generation.heads import DepthHead, SingleCodeHead, VisualHead, ZeroLinear
from vqrae.generation.modeling import VisualVocabulary, build_llm
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.projections import AttentionProjection


class MultiCodeConfig(PreTrainedConfig):
    """Stored as `config.json`.

    Args:
        llm_config: of the language model, a mapping with its `model_type`.
        num_codebooks, codebook_size: n and K of the tokenizer.
        projection: of the tokenizer's codebooks into the language model: `kind` (`linear` or
            `attention`), `in_dim`, `out_dim`, `num_heads` and the width of a code vector
            `code_dim`. None: the sum of n learned tables.
        head: arguments of `DepthHead`.
        grid_size: codes of a side, for 2-D RoPE (see `GridRotary`); 0: the language model's RoPE.
        dropout: share of input vectors, and of what every layer adds to them, that is dropped.
    """

    model_type = "vqrae_multi_code"

    def __init__(
        self,
        llm_config: dict[str, Any] | None = None,
        num_codebooks: int = 8,
        codebook_size: int = 4096,
        projection: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        grid_size: int = 0,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # transformers also builds the configuration without any argument.
        self.llm_config = dict(llm_config or {"model_type": "qwen3"})
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.projection = projection
        self.head = dict(head or {})
        self.grid_size, self.dropout = grid_size, dropout
        super().__init__(**kwargs)

    def build_llm_config(self) -> PreTrainedConfig:
        """The language model's own configuration object."""
        values = dict(self.llm_config)
        return CONFIG_MAPPING[values.pop("model_type")](**values)

    @property
    def hidden_size(self) -> int:
        """D; DeepSpeed sizes its buffers by it."""
        return self.build_llm_config().hidden_size


@dataclass
class MultiCodeOutput(ModelOutput):
    """Attributes:
    loss: scalar.
    """

    loss: Tensor | None = None


class MultiCodeModel(PreTrainedModel):
    """A language model with an embedding of codes and a depth head."""

    config: MultiCodeConfig
    config_class = MultiCodeConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MultiCodeConfig, llm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        llm_config = config.build_llm_config()
        llm_config._attn_implementation = config._attn_implementation
        self.llm: PreTrainedModel = llm or AutoModelForCausalLM.from_config(
            llm_config, attn_implementation=config._attn_implementation
        )
        self.embedding = build_embedding(config, llm_config.hidden_size)
        self.head = DepthHead(llm_config, config.num_codebooks, config.codebook_size, **config.head)
        if config.grid_size:
            self.llm.base_model.rotary_emb = GridRotary(llm_config, config.grid_size)
        if config.dropout:
            for decoder in (self.llm.base_model, self.head.decoder):
                drop_residuals(decoder, config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The classifier of codes, which Muon leaves to AdamW as any head."""
        return self.head.classifier

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, codes: Tensor
    ) -> MultiCodeOutput:
        """The loss of images after their prompts.

        Args:
            input_ids: (B, T) prompts that end in BOI, padded in front.
            attention_mask, position_ids: (B, T + N).
            codes: (B, N, n).
        """
        text_BTD = self.get_input_embeddings()(input_ids)
        # The last position predicts nothing.
        image_BND = self.embedding(codes[:, :-1]).to(text_BTD.dtype)
        vectors = torch.cat([text_BTD, image_BND], dim=1)
        hidden = self.llm.base_model(
            inputs_embeds=F.dropout(vectors, self.config.dropout, self.training),
            attention_mask=attention_mask[:, :-1],
            position_ids=position_ids[:, :-1],
            use_cache=False,
        ).last_hidden_state[:, -codes.shape[1] :]
        return MultiCodeOutput(loss=self.head.loss(hidden.flatten(0, 1), codes.flatten(0, 1)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embedding and head as the language model, whose own rules its parts follow."""
        std = getattr(self.llm.config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Embedding):
            # By its class: transformers passes over modules without weights of their own.
            init.normal_(module.weight, std=0.0 if isinstance(module, ZeroLinear) else std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


def build_embedding(config: MultiCodeConfig, width: int) -> TableEmbedding | TokenizerEmbedding:
    """The embedding of codes that a configuration describes, with random weights."""
    if config.projection is None:
        return TableEmbedding(config.num_codebooks, config.codebook_size, width)
    sizes = dict(config.projection)
    code_dim, kind = sizes.pop("code_dim"), sizes.pop("kind")
    table = torch.zeros(config.num_codebooks, config.codebook_size, code_dim)
    if kind == "linear":
        linear = FullPrecisionLinear(sizes["in_dim"], sizes["out_dim"])
        return TokenizerEmbedding(table, linear, sizes["out_dim"], width)
    causal = AttentionProjection(**sizes, causal=True)
    return TokenizerEmbedding(table, causal, sizes["out_dim"], width)


def projection_of(tokenizer: VQRAEModel) -> dict[str, Any]:
    """The `projection` of a `MultiCodeConfig` that starts from this tokenizer."""
    config = tokenizer.config
    return {
        "kind": config.projection,
        "code_dim": tokenizer.code_vectors().shape[-1],
        "in_dim": config.codebook_dim,
        "out_dim": config.feature_dim,
        "num_heads": config.projection_heads,
    }


class GridRotary(nn.Module):
    """LlamaGen's 2-D RoPE: half of the channels turn with the row, half with the column.

    Position 0 is the class, which LlamaGen's code multiplies by zero instead of turning it: its
    query and key vanish. Position p > 0 is cell p - 1. Channels are in transformers' order.
    """

    def __init__(self, config: PreTrainedConfig, grid_size: int) -> None:
        super().__init__()
        self.grid_size, self.head_dim = grid_size, config.head_dim
        self.base = config.rope_parameters["rope_theta"]

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, S, head_dim) of positions (B, S)."""
        half = self.head_dim // 2
        steps = torch.arange(0, half, 2, device=position_ids.device) / half
        frequencies = self.base**-steps
        cells = (position_ids - 1)[..., None]
        rows, columns = cells // self.grid_size, cells % self.grid_size
        angles = torch.cat([rows * frequencies, columns * frequencies], dim=-1).repeat(1, 1, 2)
        is_cell = cells >= 0
        return (angles.cos() * is_cell).to(hidden), (angles.sin() * is_cell).to(hidden)


def drop_residuals(decoder: PreTrainedModel, share: float) -> None:
    """Drop out what attention and MLP of every layer add, in training."""

    def drop(module: nn.Module, given: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    for layer in decoder.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a language model's configuration that describe its shape."""
    left_out = ("_name_or_path", "architectures", "dtype", "transformers_version")
    values = config.to_diff_dict()
    return {key: value for key, value in values.items() if key not in left_out}


def build_multi_code(
    vocabulary: VisualVocabulary,
    tokenizer: VQRAEModel,
    *,
    embedding: str,
    head: dict[str, Any],
    grid_size: int = 0,
    dropout: float = 0.0,
    **llm: Any,
) -> MultiCodeModel:
    """A model for the codes of a tokenizer.

    Args:
        embedding: `tokenizer`, which starts from its codebooks and output projection, or `tables`.
        head, grid_size, dropout: see `MultiCodeConfig`.
        llm: see `build_llm`.
    """
    model = build_llm(AutoModelForCausalLM, vocabulary, **llm)
    visual = tokenizer.config
    config = MultiCodeConfig(
        llm_config=values_of(model.config),
        num_codebooks=visual.num_codebooks,
        codebook_size=visual.codebook_size,
        projection=projection_of(tokenizer) if embedding == "tokenizer" else None,
        head=head,
        grid_size=grid_size,
        dropout=dropout,
    )
    config.visual_vocabulary = vocabulary.values()
    built = MultiCodeModel._from_config(
        config, llm=model, attn_implementation=model.config._attn_implementation
    )
    if isinstance(built.embedding, TokenizerEmbedding):
        built.embedding.start_from(tokenizer.code_vectors(), tokenizer.out_proj)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.get_output_embeddings().requires_grad_(False)  # the head of text has no part here
    return built


class Parts(NamedTuple):
    """How codes enter and leave a generator."""

    decoder: PreTrainedModel
    """Vectors -> final-normed states."""
    embedding: CodeEmbedding
    head: VisualHead


def generator_parts(model: PreTrainedModel, vocabulary: VisualVocabulary) -> Parts:
    """The parts of a `MultiCodeModel`, or of a `Qwen3ForCausalLM` with one code a position."""
    if isinstance(model, MultiCodeModel):
        return Parts(model.llm.base_model, model.embedding, model.head)
    embedding = TokenEmbedding(model.get_input_embeddings(), vocabulary.offset)
    return Parts(model.model, embedding, SingleCodeHead(model.lm_head, vocabulary.code_rows))


GENERATORS = {Qwen3Config.model_type: Qwen3ForCausalLM, MultiCodeConfig.model_type: MultiCodeModel}
"""Kinds of generators by the `model_type` of their folder."""

AutoConfig.register(MultiCodeConfig.model_type, MultiCodeConfig)
AutoModel.register(MultiCodeConfig, MultiCodeModel)
