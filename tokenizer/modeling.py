"""VQRAE: a pretrained encoder, a quantizer, a symmetric ViT decoder (arXiv 2511.23386, section
3.2).

    features = model.encode_features(images)   # continuous, for understanding
    codes = model.encode(images)               # discrete, for generation
    images = model.decode(codes)
    output = model(images)                     # reconstruction and losses, for training

Shapes: B batch, H W pixels, N = G * G visual tokens, D feature width, E codebook width, K codes of
each of n codebooks. Codes are (B, N) of one codebook, (B, N, n) of several.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
)
from transformers import initialization as init

from vqrae.common.checkpoints import load_model
from vqrae.common.distributed import FullPrecisionLinear
from vqrae.tokenizer.configuration import ViTaminConfig, VQRAEConfig
from vqrae.tokenizer.conv_decoder import ConvDecoder
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.projections import AttentionProjection
from vqrae.tokenizer.quantizers.base import Quantizer
from vqrae.tokenizer.quantizers.registry import build_quantizer
from vqrae.tokenizer.vit_decoder import DCTBasis, ViTDecoder


@dataclass
class VQRAEOutput:
    """Attributes:
    reconstruction: (B, 3, H', W'), clamped to [0, 1] in evaluation alone: losses need the excess.
    features: (B, N, D) continuous encoder output.
    fused: these and the `fused_layers`, side by side: what the quantizer's projection reads.
    codes: (B, N) or (B, N, n), int64.
    losses: unweighted losses of the quantizer by name.
    quantized_features: (B, N, D), what the decoder reads.
    """

    reconstruction: Tensor
    features: Tensor
    fused: Tensor
    codes: Tensor
    losses: dict[str, Tensor]
    quantized_features: Tensor


class VQRAEModel(PreTrainedModel):
    """The visual tokenizer of images (B, 3, H, W) in [0, 1]; it normalises them for its encoder."""

    config: VQRAEConfig
    config_class = VQRAEConfig
    base_model_prefix = ""
    main_input_name = "images"
    supports_gradient_checkpointing = True
    text_tokenizer: PreTrainedTokenizerBase | None = None
    """What a training reads captions with; a part of the folder that `AutoTokenizer` opens."""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Nearest codes change with the rounding of bf16: in a half-precision model these stay fp32.
    _keep_in_fp32_modules_strict = (
        r"^(in_proj|quantizer|out_proj)\.",
        r"^feature_(mean|std)$",
        r"^logit_(scale|bias)$",
    )

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__(config)
        self.encoder: PreTrainedModel = AutoModel.from_config(
            config.build_encoder_config(), attn_implementation=config._attn_implementation
        )
        width = config.feature_dim
        self.in_proj = build_projection(config, config.fused_dim, config.codebook_dim)
        self.quantizer: Quantizer = build_quantizer(
            config.quantizer,
            config.codebook_size,
            config.codebook_dim,
            config.num_codebooks,
            **config.quantizer_options,
        )
        self.out_proj = build_projection(config, config.codebook_dim, width)
        self.decoder = build_decoder(config, self.encoder)
        if config.text_config is not None:
            self._add_text_side(CLIPTextConfig(**config.text_config))
        # fp32 by name: while a half-precision model is built, the default is another.
        image_mean = torch.tensor(config.image_mean, dtype=torch.float32).view(3, 1, 1)
        image_std = torch.tensor(config.image_std, dtype=torch.float32).view(3, 1, 1)
        self.register_buffer("image_mean", image_mean, persistent=False)
        self.register_buffer("image_std", image_std, persistent=False)
        self.register_buffer("feature_mean", torch.zeros(config.fused_dim))
        self.register_buffer("feature_std", torch.ones(config.fused_dim))
        self.post_init()

    # ---- the four calls that everything else builds on

    def encode_features(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> continuous features (B, N, D).

        Args:
            check: check the range of values, which makes the host wait; never in training mode.

        Raises:
            ValueError: for another size, integers, or values outside [0, 1].
        """
        return self.encode_fused(images, check=check)[..., : self.config.feature_dim]

    def encode_fused(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Images (B, 3, H, W) -> features, then those of `fused_layers`: (B, N, D * (1 + L))."""
        check_images(images, self.config.image_size, values=check and not self.training)
        pixel_values = self.normalize(images.float()).to(self.encoder.dtype)
        tap, layers = self.config.feature_tap, self.config.fused_layers
        return encoder_features(self.encoder, pixel_values, tap, layers)

    def encode(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> codes, int64; see `encode_features`."""
        return self.choose_codes(self.encode_fused(images, check=check))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> images (B, 3, H', W') in [0, 1], equal to `forward`'s reconstruction.

        Raises:
            ValueError: for codes of another grid, of another number of codebooks, or outside them.
        """
        expected = self.config.code_shape
        if codes.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"got codes of shape {tuple(codes.shape)}, expected (B, {sizes})")
        if codes.min() < 0 or codes.max() >= self.config.codebook_size:
            raise ValueError(
                f"got codes from {codes.min()} to {codes.max()}, "
                f"expected 0 to {self.config.codebook_size - 1}"
            )
        return self.decode_pixels(self.features_of(codes)).clamp(0, 1)

    def quantized_features(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> what the decoder reads (B, N, D), fp32."""
        return self.features_of(self.encode(images, check=check))

    def forward(
        self, images: Tensor, *, bypass: bool = False, decoded: int | None = None
    ) -> VQRAEOutput:
        """Reconstruct images (B, 3, H, W) in [0, 1].

        Args:
            bypass: decode the unquantized features, as an autoencoder (to warm up a training).
            decoded: the number of images, the first ones, that are reconstructed; None: all.
        """
        fused = self.encode_fused(images)
        features_BND = fused[..., : self.config.feature_dim]
        projected_BNE = self.project(fused)
        with torch.autocast(images.device.type, enabled=False):
            output = self.quantizer(projected_BNE)
            decoded_BNE = output.quantized
            if bypass:
                decoded_BNE = self.quantizer.to_code_space(projected_BNE)
            hidden_BND = self.out_proj(decoded_BNE)
        reconstruction = self.decode_pixels(hidden_BND[:decoded])
        if not self.training:
            reconstruction = reconstruction.clamp(0, 1)
        return VQRAEOutput(
            reconstruction, features_BND, fused, output.codes, output.losses, hidden_BND
        )

    # ---- their parts

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> the encoder's `pixel_values`."""
        return (images - self.image_mean) / self.image_std

    def choose_codes(self, features: Tensor) -> Tensor:
        """What `encode_fused` gives -> codes, int64."""
        projected_BNE = self.project(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.quantizer(projected_BNE).codes

    def project(self, features: Tensor) -> Tensor:
        """What `encode_fused` gives -> what the quantizer searches with (B, N, E), in fp32.

        Raises:
            ValueError: for features of another width, or a projection cast to half precision.
        """
        dtype = next(iter(self.in_proj.state_dict().values())).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"got a projection in {dtype}, expected torch.float32: codes need it. "
                "Load the folder with from_pretrained(dtype=torch.bfloat16), which leaves it in "
                "fp32, instead of casting the whole model"
            )
        if features.shape[-1] != self.config.fused_dim:
            raise ValueError(
                f"got features of width {features.shape[-1]}, expected {self.config.fused_dim}: "
                "those of encode_fused, which has the fused layers"
            )
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.config.feature_norm == "layernorm":
                layers = features.unflatten(-1, (-1, self.config.feature_dim))
                features = nn.functional.layer_norm(layers, layers.shape[-1:]).flatten(-2)
            elif self.config.feature_norm == "standardize":
                features = (features - self.feature_mean) / self.feature_std
            return self.in_proj(features)

    def decode_pixels(self, hidden: Tensor) -> Tensor:
        """Decoder input (B, N, D) -> images (B, 3, H', W'), not clamped."""
        pixel_values = self.decoder(hidden.to(next(self.decoder.parameters()).dtype)).float()
        return pixel_values * self.image_std + self.image_mean

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """The vectors of all codes in their order: (K, E), or (n, K, …) of several codebooks."""
        return self.quantizer.code_vectors()

    def features_of(self, codes: Tensor) -> Tensor:
        """Codes -> what the decoder reads (B, N, D), fp32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.out_proj(self.quantizer.lookup(codes))

    # ---- images and texts in one space, given a `text_config`; P is its `projection_dim`

    def _add_text_side(self, config: CLIPTextConfig) -> None:
        self.text_model = CLIPTextModel._from_config(
            config, attn_implementation=self.config._attn_implementation
        )
        width, common = self.config.feature_dim, config.projection_dim
        self.text_projection = nn.Linear(config.hidden_size, common, bias=False)
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.image_projection = nn.Linear(width, common)
        # The starts of CLIP and of SigLIP; not scalars, which DeepSpeed cannot broadcast.
        is_sigmoid = self.config.contrastive == "sigmoid"
        self.logit_scale = nn.Parameter(torch.tensor([10 if is_sigmoid else 1 / 0.07]).log())
        if is_sigmoid:
            self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def text_side(self) -> nn.ModuleList:
        """All that only embeddings are made with."""
        side = nn.ModuleList([self.text_model, self.text_projection])
        side += [self.fc_norm, self.image_projection]
        for name in ("logit_scale", "logit_bias"):
            if hasattr(self, name):
                side.register_parameter(name, getattr(self, name))
        return side

    def image_embeddings(self, features: Tensor) -> Tensor:
        """Features or `quantized_features` (B, N, D) -> their embeddings (B, P), of length 1."""
        mean_BD = features.mean(1).to(self.fc_norm.weight.dtype)
        return F.normalize(self.image_projection(self.fc_norm(mean_BD)), dim=-1)

    def text_embeddings(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T), each row with an end token -> embeddings (B, P), of length 1.

        Args:
            attention_mask: (B, T); not needed for padding at the end, which no token sees.
        """
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return F.normalize(self.text_projection(output.pooler_output), dim=-1)

    # ---- its folder

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> "VQRAEModel":
        """Load a tokenizer folder or hub id, with the options of `PreTrainedModel`.

        Raises:
            ValueError: for weights that are damaged, missing, unknown, of another shape or not
                finite: codes would be noise.
        """
        return load_model(super(), pretrained_model_name_or_path, allow_unknown=False, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json, model.safetensors, preprocessor_config.json and the text tokenizer."""
        super().save_pretrained(save_directory, **options)
        self.image_processor().save_pretrained(save_directory)
        if self.text_tokenizer is not None:
            self.text_tokenizer.save_pretrained(str(save_directory))

    def image_processor(self) -> SiglipImageProcessor:
        """The Hugging Face image processor that prepares images as this package does."""
        size = self.config.image_size
        return SiglipImageProcessor(
            size={"shortest_edge": size},
            do_center_crop=True,
            crop_size={"height": size, "width": size},
            image_mean=list(self.config.image_mean),
            image_std=list(self.config.image_std),
            resample=3,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Decoder and projections as in ViT; the encoder and the quantizer have their own rules."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.xavier_normal_(module.weight, gain=0.5)  # UniTok's code
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ViTDecoder):
            init.trunc_normal_(module.positions, std=0.02)
        elif isinstance(module, Quantizer | DCTBasis):
            module.reset_parameters()
        elif module is self:
            # from_pretrained builds on the meta device: what no file holds is set here.
            init.copy_(self.image_mean, torch.tensor(self.config.image_mean).view(3, 1, 1))
            init.copy_(self.image_std, torch.tensor(self.config.image_std).view(3, 1, 1))
            init.zeros_(self.feature_mean)
            init.ones_(self.feature_std)


def build_projection(config: VQRAEConfig, in_dim: int, out_dim: int) -> nn.Module:
    """The way from features into the code space or back: (B, N, in_dim) -> (B, N, out_dim)."""
    if config.projection == "attention":
        return AttentionProjection(in_dim, out_dim, config.projection_heads)
    return FullPrecisionLinear(in_dim, out_dim)


def build_decoder(config: VQRAEConfig, encoder: PreTrainedModel) -> ViTDecoder | ConvDecoder:
    """The way from hidden features (B, N, D) to normalised pixels (B, 3, H', W')."""
    patch_size = config.output_patch_size or config.patch_size
    if config.decoder == "conv":
        in_pixels = config.output_basis == "pixels" and config.output_patch_size is None
        if not (isinstance(encoder.config, ViTaminConfig) and in_pixels):
            raise ValueError(
                "decoder=conv mirrors encoder_config.model_type=vitamin, with output_basis=pixels "
                f"and output_patch_size=null: got {encoder.config.model_type}, "
                f"{config.output_basis} and {config.output_patch_size}"
            )
        return ConvDecoder(encoder.config)
    return ViTDecoder(encoder, config.grid_size, patch_size, config.output_basis)


def check_images(images: Tensor, size: int, *, values: bool) -> None:
    """Refuse images that are not float (B, 3, size, size) and, if asked, in [0, 1] up to rounding.

    Raises:
        ValueError: naming what was found and how to change it.
    """
    if images.shape[1:] != (3, size, size):
        raise ValueError(
            f"got images of shape {tuple(images.shape)}, expected (B, 3, {size}, {size})"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"got images of {images.dtype}, expected floats in [0, 1]: divide 8-bit values by 255"
        )
    if values:
        low, high = (value.item() for value in images.aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails both
            raise ValueError(
                f"got images with values from {low:.4g} to {high:.4g}, expected [0, 1]: divide "
                "8-bit values by 255, map [-1, 1] by (x + 1) / 2, clamp what a resize overshoots"
            )


AutoModel.register(VQRAEConfig, VQRAEModel)
