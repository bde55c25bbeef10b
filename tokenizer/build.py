"""From the configuration of a run to a tokenizer."""

import math
from pathlib import Path

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from vqrae.tokenizer.config import ModelConfig, TokenizerTrainConfig
from vqrae.tokenizer.configuration import VQRAEConfig, layer_numbers
from vqrae.tokenizer.encoders import load_encoder, load_text_side
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.quantizers.base import CodebookQuantizer
from vqrae.tokenizer.quantizers.registry import quantizer_class
from vqrae.tokenizer.text import build_text_tokenizer, with_text_ids


def initial_model(config: TokenizerTrainConfig, number: int, attention: str) -> VQRAEModel:
    """The tokenizer as it enters a stage: on the pretrained encoder, or as stage 1 left it.

    Raises:
        FileNotFoundError: when stage 2 has no stage 1.
    """
    if number == 1:
        return first_model(config, attention)
    first = Path(config.output_dir) / "stage1" / "model"
    if not first.is_dir():
        raise FileNotFoundError(
            f"stage 2 starts from {first}, which does not exist: run stage=1 first, or stage=both"
        )
    model = VQRAEModel.from_pretrained(first, attn_implementation=attention)
    if model.config.text_config is not None:
        model.text_tokenizer = AutoTokenizer.from_pretrained(first)
    return model


def first_model(config: TokenizerTrainConfig, attention: str) -> VQRAEModel:
    """The tokenizer as it enters stage 1, with its text tokenizer if it has a text side."""
    text_tokenizer, model_config = build_text_tokenizer(config), config.model
    if text_tokenizer is not None:
        model_config = with_text_ids(model_config, text_tokenizer)
    model = build_tokenizer(model_config, attention)
    for number in config.all_stages:  # refused now rather than after stage 1
        aligned = config.stage_config(number).alignment_layers
        layer_numbers(aligned, model.encoder.config.num_hidden_layers)
    model.text_tokenizer = text_tokenizer
    return model


def build_tokenizer(config: ModelConfig, attention: str) -> VQRAEModel:
    """A tokenizer with a pretrained encoder, or a random one when only its configuration is given.

    Raises:
        ValueError: when neither is given, or the encoder is not what its configuration says.
    """
    if config.encoder is None and config.encoder_config is None:
        raise ValueError("model: give encoder (pretrained weights) or encoder_config (random ones)")
    encoder = load_encoder(config.encoder, attention) if config.encoder else None
    encoder_config = config.encoder_config
    if encoder is not None:
        given = dict(config.encoder_config or {})
        # How it trains, not what it is.
        drop_path = {"drop_path": given.pop("drop_path")} if "drop_path" in given else {}
        for key, expected in given.items():
            found = getattr(encoder.config, key)
            if (list(found) if isinstance(found, tuple) else found) != expected:
                raise ValueError(
                    f"model.encoder_config.{key}: {config.encoder} has {found!r}, "
                    f"expected {expected!r}"
                )
        model_type = {"model_type": encoder.config.model_type}
        encoder_config = encoder.config.to_diff_dict() | model_type | drop_path
    size = {"image_size": config.image_size} if config.image_size else {}
    tokenizer_config = VQRAEConfig(
        encoder_config={**(encoder_config or {}), **size},
        feature_tap=config.feature_tap,
        fused_layers=config.fused_layers,
        feature_norm=config.feature_norm,
        quantizer=config.quantizer,
        quantizer_options=config.quantizer_options,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
        num_codebooks=config.num_codebooks,
        projection=config.projection,
        projection_heads=config.projection_heads,
        decoder=config.decoder,
        output_patch_size=config.output_patch_size,
        output_basis=config.output_basis,
        text_config=config.text_config,
        contrastive=config.contrastive,
        image_mean=config.image_mean,
        image_std=config.image_std,
        attn_implementation=attention,
    )
    model = VQRAEModel(tokenizer_config)
    if encoder is not None:
        weights = encoder.state_dict()
        if config.image_size:
            weights = at_image_size(weights, model.config.grid_size)
        model.encoder.load_state_dict(weights)
    if config.encoder and config.text_config is not None:
        start_text_side(model, config.encoder)
    return model


def at_image_size(weights: dict[str, Tensor], grid_size: int) -> dict[str, Tensor]:
    """Weights of a SigLIP with its position table (N, D) resampled to `grid_size` tokens a side.

    Bicubic, as for a ViT that is trained on at another resolution (arXiv 2010.11929, section 3.2).

    Raises:
        ValueError: for the weights of another encoder.
    """
    key = "embeddings.position_embedding.weight"
    if key not in weights:
        raise ValueError("model.image_size: the encoder is not a SigLIP, leave it empty")
    side = math.isqrt(len(weights[key]))
    table_1DHW = rearrange(weights[key], "(h w) d -> 1 d h w", h=side)
    resampled_1DHW = F.interpolate(
        table_1DHW, (grid_size, grid_size), mode="bicubic", antialias=True
    )
    return weights | {key: rearrange(resampled_1DHW, "1 d h w -> (h w) d")}


def start_text_side(model: VQRAEModel, encoder: str) -> None:
    """Load the text tower that an encoder was trained with, if its checkpoint has one.

    Raises:
        ValueError: when `text_config` describes another one.
    """
    weights = load_text_side(encoder)
    own = {key: value.shape for key, value in model.state_dict().items() if key.startswith("text_")}
    if weights and {key: value.shape for key, value in weights.items()} != own:
        raise ValueError(
            f"model.text_config: got {model.config.text_config}, expected the text tower that "
            f"{encoder} has"
        )
    model.load_state_dict(weights, strict=False)


def check_quantizer(config: TokenizerTrainConfig) -> None:
    """Refuse settings that the quantizer cannot follow, before anything is trained.

    Raises:
        ValueError: naming every setting that must change.
    """
    quantizer = quantizer_class(config.model.quantizer)
    has_codebook = issubclass(quantizer, CodebookQuantizer)
    wrong = []
    for number in config.stages:
        stage = config.stage_config(number)
        if not has_codebook and stage.revival_interval:
            wrong.append(f"stage{number}.revival_interval=0")
        if not has_codebook and stage.bypass_steps:
            wrong.append(f"stage{number}.bypass_steps=0")
        if not quantizer.has_entropy and stage.entropy_weight:
            wrong.append(f"stage{number}.entropy_weight=0")
        in_pixels = stage.bypass_steps and stage.codebook_metric == "pixels"
        # The metric is a linear map on both sides of a table of which the nearest row is chosen.
        is_nearest = not issubclass(quantizer, CodebookQuantizer) or quantizer.is_nearest
        if in_pixels and not (is_nearest and config.model.projection == "linear"):
            wrong.append(f"stage{number}.codebook_metric=features")
    if not has_codebook and config.model.codebook_init != "random":
        wrong.append("model.codebook_init=random")
    if wrong:
        raise ValueError(
            f"quantizer {config.model.quantizer} cannot follow all settings: set {' '.join(wrong)}"
        )
