"""Configuration of the tokenizer, stored as `config.json` in its folder."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

FEATURE_TAPS = ("hidden_states[-1]", "last_hidden_state")
OUTPUT_BASES = ("pixels", "dct")
FEATURE_NORMS = ("none", "layernorm", "standardize")
PROJECTIONS = ("linear",)
DECODERS = ("vit",)
CONTRASTIVE_LOSSES = ("softmax", "sigmoid")


class VQRAEConfig(PreTrainedConfig):
    """VQRAE (arXiv 2511.23386, section 3.2).

    Args:
        encoder_config: the Hugging Face configuration of the encoder as a mapping, with its
            `model_type` (`siglip_vision_model` or `internvl_vision`).
        feature_tap: what "the features" are, for quantizer, teacher and LLM alike.
            `hidden_states[-1]` is what LLaVA's select layer -1 reads; for SigLIP it is before
            `post_layernorm`, `last_hidden_state` after it.
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
        decoder: `vit` mirrors the blocks of a ViT.
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


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {known}")


def _side(value: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square that some encoders describe by one number, others by two."""
    return value if isinstance(value, int) else value[0]


AutoConfig.register("vqrae", VQRAEConfig)
