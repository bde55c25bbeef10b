"""A tokenizer as LLaVA's vision tower, for features that no class of transformers computes.

    import vqrae.understanding.vision_tower  # from here on, transformers opens such folders

Quantized features are those that the tokenizer's decoder reads (UniTok's understanding); an encoder
of timm needs this tower for its continuous features, too. LLaVA finds them where it looks for those
of an encoder, in `hidden_states[-1]`, so `LlavaForConditionalGeneration` is used as it is.

Shapes: B batch, H W pixels, N visual tokens, D feature width.
"""

from typing import Any, Literal

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    LlavaImageProcessor,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.modeling import VQRAEModel

Features = Literal["continuous", "quantized"]
# Encoders that LLaVA reads itself. "default" drops the first token, which is InternViT's class
# token; SigLIP has none, and neither has the tower of this module.
SELECT_STRATEGY = {"siglip_vision_model": "full", "internvl_vision": "default"}


class VQRAEFeaturesConfig(VQRAEConfig):
    """The configuration of a tokenizer, and which of its features the language model reads.

    Args:
        features: `continuous`, of the encoder, or `quantized`.
        values: of `VQRAEConfig`.
    """

    model_type = "vqrae_features"

    def __init__(self, features: Features = "quantized", **values: Any) -> None:
        self.features = features
        super().__init__(**values)

    @property
    def hidden_size(self) -> int:
        """D, by the name that LLaVA's projector reads."""
        return self.feature_dim


class VQRAEFeatures(VQRAEModel):
    """The encoder and, for quantized features, what quantizes them: a tokenizer that cannot decode.

    It is frozen and always in evaluation mode. Its projections and codebooks are buffers: an engine
    that casts parameters to bf16 and shares them among processes (DeepSpeed) would change codes.
    """

    config: VQRAEFeaturesConfig
    config_class: type[VQRAEConfig] = VQRAEFeaturesConfig
    main_input_name = "pixel_values"
    _keep_in_fp32_modules_strict: Any = (
        r"(^|vision_tower\.)(in_proj|quantizer|out_proj)\.",
        r"(^|vision_tower\.)feature_(mean|std)$",
    )
    # What a tokenizer's folder also holds: the decoder and the side of texts.
    _keys_to_ignore_on_load_unexpected: Any = (
        r"^(decoder\.|text_|fc_norm\.|image_projection\.|logit_)",
    )

    def __init__(self, config: VQRAEFeaturesConfig) -> None:
        super().__init__(config)
        del self.decoder
        for name in ("in_proj", "quantizer", "out_proj"):
            if config.features == "quantized":
                parameters_to_buffers(getattr(self, name))
            else:
                delattr(self, name)
                self._keys_to_ignore_on_load_unexpected.add(rf"^{name}\.")
        self.requires_grad_(False).eval()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:  # type: ignore[override]
        """Normalised images (B, 3, H, W) -> `hidden_states[-1]` (B, N, D), in their precision."""
        pixel_values = pixel_values.to(self.encoder.dtype)
        is_quantized, tap = self.config.features == "quantized", self.config.feature_tap
        fused = self.config.fused_layers if is_quantized else ()
        features_BND = encoder_features(self.encoder, pixel_values, tap, fused)
        if is_quantized:
            quantized_BND = self.features_of(self.choose_codes(features_BND))
            features_BND = quantized_BND.to(features_BND.dtype)
        return BaseModelOutput(last_hidden_state=features_BND, hidden_states=(features_BND,))

    def train(self, mode: bool = True) -> "VQRAEFeatures":
        """Stay in evaluation mode: in training a quantizer may move, and an encoder drop paths."""
        return super().train(False)


def parameters_to_buffers(module: nn.Module) -> None:
    """Keep the weights of a frozen module, and their names, as buffers."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight.detach())


def tower_config(tokenizer: VQRAEConfig, features: Features = "continuous") -> PreTrainedConfig:
    """Of the tower that shows these features: the encoder itself where LLaVA reads it, or ours."""
    encoder = tokenizer.build_encoder_config()
    if features == "continuous" and encoder.model_type in SELECT_STRATEGY:
        return encoder
    values = tokenizer.to_diff_dict()
    for name in ("model_type", "text_config", "architectures", "dtype", "_name_or_path"):
        values.pop(name, None)
    return VQRAEFeaturesConfig(features=features, **values)


class BorderImageProcessor(LlavaImageProcessor):
    """LLaVA's image processor with a border of another colour than the mean of the normalisation.

    `border_color` is RGB, 0 to 255.
    """

    border_color: tuple[int, int, int] | None = None

    def pad_to_square(self, images: Tensor, background_color: Any = 0) -> Tensor:
        return super().pad_to_square(images, tuple(self.border_color or background_color))


AutoConfig.register("vqrae_features", VQRAEFeaturesConfig)
AutoModel.register(VQRAEFeaturesConfig, VQRAEFeatures)
AutoImageProcessor.register(VQRAEFeaturesConfig, fast_image_processor_class=BorderImageProcessor)
