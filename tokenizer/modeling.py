"""VQRAE: a pretrained vision encoder, a quantizer on its features, a symmetric ViT decoder (arXiv 2511.23386).

    features = model.encode_features(images)   # continuous, for understanding
    codes = model.encode(images)               # discrete, for generation
    images = model.decode(codes)

Shapes: B batch, H W pixels, N visual tokens, D feature width, E codebook width.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, SiglipImageProcessor
from transformers import initialization as init

from vqrae.common.checkpoints import require_finite
from vqrae.common.distributed import FullPrecisionLinear
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.decoder import DCTBasis, ViTDecoder
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.quantizers.base import CodebookQuantizer, Quantizer
from vqrae.tokenizer.quantizers.registry import build_quantizer


@dataclass
class VQRAEOutput:
    """Attributes:
    reconstruction: (B, 3, H', W'); in [0, 1] in evaluation, not clamped in training (losses need the excess).
    features: (B, N, D) continuous encoder output.
    codes: (B, N) int64.
    losses: unweighted losses of the quantizer by name.
    """

    reconstruction: Tensor
    features: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class VQRAEModel(PreTrainedModel):
    """The visual tokenizer. Images are float (B, 3, H, W) in [0, 1]; the encoder's normalisation is inside."""

    config: VQRAEConfig
    config_class = VQRAEConfig
    base_model_prefix = ""
    main_input_name = "images"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Nearest codes change with the rounding of bf16, so what makes them stays fp32 in a half-precision model.
    _keep_in_fp32_modules_strict = (
        r"^(in_proj|quantizer|out_proj)\.",
        r"^feature_(mean|std)$",
    )  # regular expressions

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__(config)
        self.encoder: PreTrainedModel = AutoModel.from_config(
            config.build_encoder_config(), attn_implementation=config._attn_implementation
        )
        width = config.feature_dim
        self.in_proj = FullPrecisionLinear(width, config.codebook_dim)
        self.quantizer: Quantizer = build_quantizer(
            config.quantizer, config.codebook_size, config.codebook_dim, **config.quantizer_options
        )
        self.out_proj = FullPrecisionLinear(config.codebook_dim, width)
        patch_size = config.output_patch_size or config.patch_size
        self.decoder = ViTDecoder(self.encoder, config.grid_size, patch_size, config.output_basis)
        fp32: dict[str, Any] = {
            "dtype": torch.float32
        }  # whatever the default is while a half-precision model is built
        self.register_buffer(
            "image_mean", torch.tensor(config.image_mean, **fp32).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "image_std", torch.tensor(config.image_std, **fp32).view(3, 1, 1), persistent=False
        )
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_std", torch.ones(width))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a tokenizer folder or hub id; the arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: where weights are damaged, missing, left over, of another shape or not finite: codes would be noise
                without a word.
        """
        with_report = kwargs.pop("output_loading_info", False)
        kwargs = {
            "ignore_mismatched_sizes": True,
            **kwargs,
            "output_loading_info": True,
        }  # reported below
        try:
            model, report = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {pretrained_model_name_or_path} are damaged: {error}"
            ) from error
        found = {**report, "mismatched_keys": {key for key, *_ in report["mismatched_keys"]}}
        wrong = {
            "missing_keys": "lacks",
            "unexpected_keys": "has unknown",
            "mismatched_keys": "has other shapes of",
        }
        for kind, verb in wrong.items():
            if keys := sorted(found[kind]):
                raise ValueError(
                    f"{pretrained_model_name_or_path} {verb} weights of a tokenizer: {len(keys)}, the first is {keys[0]}; "
                    "take a folder that was written whole, whose config.json belongs to its weights"
                )
        require_finite(model, str(pretrained_model_name_or_path))
        return (model, report) if with_report else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Decoder and projections as in ViT; the encoder initialises itself, the quantizer by its own rule."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ViTDecoder):
            init.trunc_normal_(module.positions, std=0.02)
        elif isinstance(module, Quantizer | DCTBasis):
            module.reset_parameters()
        elif module is self:
            init.copy_(self.image_mean, torch.tensor(self.config.image_mean).view(3, 1, 1))
            init.copy_(self.image_std, torch.tensor(self.config.image_std).view(3, 1, 1))
            init.zeros_(self.feature_mean)
            init.ones_(self.feature_std)

    # ---- the four calls that everything else builds on

    def encode_features(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> continuous features (B, N, D).

        Args:
            check: look at the range of values, for which a GPU is waited for; never done in training mode.

        Raises:
            ValueError: for another size, integers, or values outside of [0, 1].
        """
        self._check_images(images)
        if check and not self.training:
            check_range(images)
        pixel_values = self.normalize(images.float()).to(self.encoder.dtype)
        return encoder_features(self.encoder, pixel_values, self.config.feature_tap)

    def encode(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> codes (B, N), int64. `check` and errors as in `encode_features`."""
        projected = self.project(self.encode_features(images, check=check))
        with torch.autocast(images.device.type, enabled=False):
            return self.quantizer(projected).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) -> images (B, 3, H', W') in [0, 1], equal to the reconstruction that `forward` returns.

        Raises:
            ValueError: for codes of another grid or outside of the codebook.
        """
        expected = self.config.grid_size**2
        if codes.shape[1] != expected:
            raise ValueError(f"got codes of shape {tuple(codes.shape)}, expected (B, {expected})")
        if codes.min() < 0 or codes.max() >= self.config.codebook_size:
            raise ValueError(
                f"got codes from {codes.min()} to {codes.max()}, expected 0 to {self.config.codebook_size - 1}"
            )
        with torch.autocast(codes.device.type, enabled=False):
            hidden = self.out_proj(self.quantizer.lookup(codes))
        return self.decode_pixels(hidden).clamp(0, 1)

    def forward(self, images: Tensor, *, bypass: bool = False) -> VQRAEOutput:
        """Reconstruct images (B, 3, H, W) in [0, 1].

        Args:
            bypass: decode the unquantized features, as an autoencoder (a training's warm-up; codes stay what they are).
        """
        features = self.encode_features(images)
        projected = self.project(features)
        with torch.autocast(images.device.type, enabled=False):
            output = self.quantizer(projected)
            hidden = self.out_proj(
                self.quantizer.to_code_space(projected) if bypass else output.quantized
            )
        reconstruction = self.decode_pixels(hidden)
        if not self.training:
            reconstruction = reconstruction.clamp(0, 1)
        return VQRAEOutput(reconstruction, features, output.codes, output.losses)

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """The vectors of all codes (K, E), in the order of the codes."""
        return self.quantizer.lookup(torch.arange(self.config.codebook_size, device=self.device))

    # ---- parts

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> the encoder's `pixel_values`."""
        return (images - self.image_mean) / self.image_std

    def project(self, features: Tensor) -> Tensor:
        """Features (B, N, D) -> what the quantizer searches with (B, N, E), in fp32.

        Raises:
            ValueError: for a model whose projection was cast to half precision.
        """
        if self.in_proj.weight.dtype != torch.float32:
            raise ValueError(
                f"got a projection in {self.in_proj.weight.dtype}, expected torch.float32: codes need it. Load the folder "
                "with from_pretrained(dtype=torch.bfloat16), which leaves it in fp32, instead of casting the whole model"
            )
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.config.feature_norm == "layernorm":
                features = nn.functional.layer_norm(features, features.shape[-1:])
            elif self.config.feature_norm == "standardize":
                features = (features - self.feature_mean) / self.feature_std
            return self.in_proj(features)

    def decode_pixels(self, hidden: Tensor) -> Tensor:
        """Decoder input (B, N, D) -> images; the decoder speaks the encoder's normalised pixels."""
        return (
            self.decoder(hidden.to(self.decoder.head.weight.dtype)).float() * self.image_std
            + self.image_mean
        )

    def with_plain_codebook(self) -> "VQRAEModel":
        """An equal model with `quantizer=vq`: the same codes and images, from a table that needs nothing of its training.

        It is another tokenizer to everything that checks fingerprints, though codes can be exchanged.

        Raises:
            ValueError: where the codes are not the nearest rows of a table.
        """
        if not (isinstance(self.quantizer, CodebookQuantizer) and self.quantizer.equals_vq):
            raise ValueError(
                f"the codes of quantizer {self.config.quantizer} are not those of a plain table"
            )
        config = copy.deepcopy(self.config)
        config.quantizer, config.quantizer_options = "vq", {"search": self.quantizer.search}
        model = VQRAEModel(config).to(self.device)
        rest = {
            key: value
            for key, value in self.state_dict().items()
            if not key.startswith("quantizer.")
        }
        model.load_state_dict(rest | {"quantizer.codebook": self.code_vectors()})
        return model.train(self.training)

    def _check_images(self, images: Tensor) -> None:
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, expected (B, 3, {size}, {size})"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"got images of {images.dtype}, expected floats in [0, 1]: divide 8-bit values by 255"
            )

    def image_processor(self) -> SiglipImageProcessor:
        """The Hugging Face image processor that prepares images as this package does.

        The shorter edge is resized, the centre cropped, and `pixel_values` equal this model's own normalisation.
        """
        size = self.config.image_size
        return SiglipImageProcessor(
            size={"shortest_edge": size},
            do_center_crop=True,
            crop_size={"height": size, "width": size},
            image_mean=list(self.config.image_mean),
            image_std=list(self.config.image_std),
            resample=3,
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json."""
        super().save_pretrained(save_directory, **kwargs)
        self.image_processor().save_pretrained(save_directory)


def check_range(images: Tensor) -> None:
    """Refuse images that are not in [0, 1], up to rounding; one pass over the values.

    Raises:
        ValueError: naming what was found and how to change it.
    """
    lowest, highest = (value.item() for value in images.aminmax())
    if not (lowest >= -1e-3 and highest <= 1 + 1e-3):  # NaN fails both
        raise ValueError(
            f"got images with values from {lowest:.4g} to {highest:.4g}, expected [0, 1]: divide 8-bit values by 255, map "
            "[-1, 1] by (x + 1) / 2, clamp what a resize overshoots"
        )


AutoModel.register(VQRAEConfig, VQRAEModel)
