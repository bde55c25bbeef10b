"""Configuration of the tokenizer, stored as `config.json` in its folder."""

from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

FEATURE_TAPS = ("hidden_states[-1]", "last_hidden_state")
OUTPUT_BASES = ("pixels", "dct")
FEATURE_NORMS = ("none", "layernorm", "standardize")
PROJECTIONS = ("linear", "attention")
DECODERS = ("vit", "conv")
CONTRASTIVE_LOSSES = ("softmax", "sigmoid")


class VQRAEConfig(PreTrainedConfig):
    """VQRAE (arXiv 2511.23386, section 3.2).

    Args:
        encoder_config: the Hugging Face configuration of the encoder as a mapping, with its
            `model_type` (`siglip_vision_model`, `internvl_vision` or `vitamin`).
        feature_tap: what "the features" are, for quantizer, teacher and LLM alike.
            `hidden_states[-1]` is what LLaVA's select layer -1 reads; for SigLIP it is before
            `post_layernorm`, `last_hidden_state` after it.
        fused_layers: hidden states that the quantizer reads next to the features, which stay those
            of the tap: 0 is the embeddings, -2 the last layer but one. None in the paper.
        feature_norm: what precedes the quantizer's projection: nothing (the paper says nothing),
            `layernorm` without affine (RAE), or `standardize` by channel statistics measured once
            on data (tames outlier channels).
        quantizer: a name of `vqrae.tokenizer.quantizers.registry.QUANTIZERS`.
        quantizer_options: further arguments of that quantizer's class.
        codebook_size: K of each codebook (VQRAE: 16384, UniTok: 4096).
        codebook_dim: E of the whole quantized vector (VQRAE: 1536, UniTok: 64).
        num_codebooks: n, the codes of a token (VQRAE: 1, UniTok: 8).
        projection: how features get into the code space and back.
        projection_heads: attention heads of that projection.
        decoder: `vit` mirrors the blocks of a ViT, `conv` blocks and convolutions of `vitamin`.
        output_patch_size: pixels of a decoded patch; None keeps the resolution.
        output_basis: the outputs of decoder `vit` are `pixels`, or coefficients of cosines (`dct`),
            which learn fine detail much sooner.
        text_config: fields of `CLIPTextConfig`; None: no text tower.
        contrastive: the loss between images and texts: CLIP's softmax, or SigLIP's sigmoid.
        image_mean, image_std: normalisation of images in [0, 1] before the encoder.
    """

    model_type = "vqrae"

    def __init__(
        self,
        encoder_config: dict[str, Any] | None = None,
        feature_tap: str = "hidden_states[-1]",
        fused_layers: Sequence[int] = (),
        feature_norm: str = "none",
        quantizer: str = "simvq",
        quantizer_options: dict[str, Any] | None = None,
        codebook_size: int = 16384,
        codebook_dim: int = 1536,
        num_codebooks: int = 1,
        projection: str = "linear",
        projection_heads: int = 16,
        decoder: str = "vit",
        output_patch_size: int | None = None,
        output_basis: str = "pixels",
        text_config: dict[str, Any] | None = None,
        contrastive: str = "softmax",
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        _require("feature_tap", feature_tap, FEATURE_TAPS)
        _require("feature_norm", feature_norm, FEATURE_NORMS)
        _require("output_basis", output_basis, OUTPUT_BASES)
        _require("projection", projection, PROJECTIONS)
        _require("decoder", decoder, DECODERS)
        _require("contrastive", contrastive, CONTRASTIVE_LOSSES)
        # transformers also builds the configuration without any argument.
        siglip = {"model_type": "siglip_vision_model", "vision_use_head": False}
        self.encoder_config = dict(encoder_config or siglip)
        self.feature_tap = feature_tap
        self.fused_layers = tuple(fused_layers)
        self.feature_norm = feature_norm
        self.quantizer = quantizer
        self.quantizer_options = dict(quantizer_options or {})
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.num_codebooks = num_codebooks
        self.projection = projection
        self.projection_heads = projection_heads
        self.decoder = decoder
        self.output_patch_size = output_patch_size
        self.output_basis = output_basis
        self.text_config = dict(text_config) if text_config is not None else None
        self.contrastive = contrastive
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        if self.fused_layers:
            depth = self.build_encoder_config().num_hidden_layers
            if depth in layer_numbers(self.fused_layers, depth):
                raise ValueError(
                    f"fused_layers: got {list(self.fused_layers)}, expected layers before the "
                    f"last, which the quantizer reads by feature_tap: 0 to {depth - 1}"
                )
        super().__init__(**kwargs)

    def build_encoder_config(self) -> PreTrainedConfig:
        """The encoder's own configuration object."""
        values = dict(self.encoder_config)
        return CONFIG_MAPPING[values.pop("model_type")](**values)

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """This configuration: transformers takes fields named `decoder` and `text_config` for the
        configuration of a language model, which a tokenizer does not have."""
        return self

    @property
    def image_size(self) -> int:
        """Pixels of a side of the (square) input."""
        return _side(self.build_encoder_config().image_size)

    @property
    def patch_size(self) -> int:
        """Pixels of a side of an input patch."""
        return _side(self.build_encoder_config().patch_size)

    @property
    def grid_size(self) -> int:
        """Visual tokens of a side; N = grid_size ** 2."""
        return self.image_size // self.patch_size

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the codes of an image: (N,), or (N, n) of several codebooks."""
        tokens = self.grid_size**2
        return (tokens,) if self.num_codebooks == 1 else (tokens, self.num_codebooks)

    @property
    def output_size(self) -> int:
        """Pixels of a side of a reconstruction."""
        return self.grid_size * (self.output_patch_size or self.patch_size)

    @property
    def feature_dim(self) -> int:
        """D, the width of the continuous features."""
        return self.build_encoder_config().hidden_size

    @property
    def fused_dim(self) -> int:
        """Width of what the quantizer's projection reads: D, and D of each fused layer."""
        return self.feature_dim * (1 + len(self.fused_layers))


class ViTaminConfig(PreTrainedConfig):
    """Convolutions at three resolutions, then a ViT; the defaults are ViTamin-L at 256 px.

    Args:
        hidden_size: D.
        stem_widths: channels of the two convolutional stages.
        stem_depths: inverted bottlenecks of each.
        patch_size: 16, or 8: the first convolution then keeps the resolution (for small images).
        hidden_act: timm's name of the activation in the ViT's MLPs; the convolutions have `gelu`.
        drop_path: chance to skip a layer of the last block; it grows linearly from 0 at the first.
    """

    model_type = "vitamin"

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 31,
        num_attention_heads: int = 16,
        stem_widths: tuple[int, int] = (160, 320),
        stem_depths: tuple[int, int] = (2, 4),
        image_size: int = 256,
        patch_size: int = 16,
        hidden_act: str = "gelu_tanh",
        drop_path: float = 0.0,
        **kwargs: Any,
    ) -> None:
        _require("patch_size", patch_size, (8, 16))
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.stem_widths = tuple(stem_widths)
        self.stem_depths = tuple(stem_depths)
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.drop_path = drop_path
        self.layer_norm_eps = 1e-6  # timm's
        super().__init__(**kwargs)


def layer_numbers(layers: Sequence[int], depth: int) -> list[int]:
    """Hidden states of an encoder counted from 0, its embeddings, to its number of blocks.

    Raises:
        ValueError: for layers that it does not have, or one that is named twice.
    """
    numbers = [layer if layer >= 0 else depth + 1 + layer for layer in layers]
    if len(set(numbers)) < len(numbers) or any(not 0 <= number <= depth for number in numbers):
        raise ValueError(
            f"layers: got {list(layers)}, expected different ones from 0, the embeddings, to "
            f"{depth}, the last of this encoder (or -1)"
        )
    return numbers


def _require(name: str, value: str | int, known: tuple[str | int, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {known}")


def _side(value: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square that some encoders describe by one number, others by two."""
    return value if isinstance(value, int) else value[0]


AutoConfig.register("vqrae", VQRAEConfig)
AutoConfig.register("vitamin", ViTaminConfig)
