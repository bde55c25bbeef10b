"""ViTamin (arXiv 2404.02132), UniTok's encoder, from timm's parts in the shape of a Hugging Face
vision model.

Shapes: B batch, H W pixels, N = H * W / patch_size ** 2 visual tokens, D feature width.
"""

from typing import Any

import torch
from timm.layers import get_act_layer
from timm.models.vision_transformer import Block
from timm.models.vitamin import GeGluMlp, MbConvLNBlock, MbConvStages, VitCfg
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from vqrae.tokenizer.configuration import ViTaminConfig


class ViTaminEmbeddings(GradientCheckpointingLayer, MbConvStages):
    """Pixels (B, 3, H, W) -> tokens (B, N, D) by timm's convolutions."""

    def __init__(self, config: ViTaminConfig) -> None:
        widths = (*config.stem_widths, config.hidden_size)
        super().__init__(VitCfg(widths, (*config.stem_depths, 1), stem_width=widths[0]))
        if config.patch_size == 8:
            self.stem.conv1.stride = (1, 1)
        for module in self.modules():
            if isinstance(module, MbConvLNBlock):
                module.init_weights()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return MbConvStages.forward(self, pixel_values).flatten(2).transpose(1, 2)


class ViTaminLayer(GradientCheckpointingLayer, Block):
    """timm's block with a gated MLP."""

    def __init__(self, config: ViTaminConfig, index: int) -> None:
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            mlp_ratio=2.0,
            qkv_bias=True,
            drop_path=config.drop_path * index / max(1, config.num_hidden_layers - 1),
            act_layer=get_act_layer(config.hidden_act),
            mlp_layer=GeGluMlp,
        )
        self.config = config

    def forward(self, *args: Any, **options: Any) -> Tensor:
        # Read now: it may have been set after the layer was built.
        self.attn.fused_attn = self.config._attn_implementation != "eager"
        return Block.forward(self, *args, **options)


class ViTaminEncoder(nn.Module):
    """The blocks of the ViT, without positions: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTaminConfig) -> None:
        super().__init__()
        layers = [ViTaminLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        states = [hidden]
        for layer in self.layers:
            states.append(layer(states[-1]))
            if not output_hidden_states:
                del states[0]
        return BaseModelOutput(states[-1], tuple(states) if output_hidden_states else None)


class ViTaminModel(PreTrainedModel):
    """`last_hidden_state` is normalised, `hidden_states` (embeddings, every block) are not."""

    config: ViTaminConfig
    config_class = ViTaminConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Both become torch's fused attention, which itself chooses flash attention where it can.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: ViTaminConfig) -> None:
        super().__init__(config)
        self.embeddings = ViTaminEmbeddings(config)
        self.encoder = ViTaminEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, **_: Any
    ) -> BaseModelOutput:
        """Normalised pixels (B, 3, H, W), of any multiples of the patch size -> (B, N, D)."""
        embeddings = self.embeddings(pixel_values)
        output = self.encoder(embeddings, output_hidden_states=output_hidden_states)
        output.last_hidden_state = self.layernorm(output.last_hidden_state)
        return output

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """timm's start; convolutions and norms have it from their constructors."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)


AutoModel.register(ViTaminConfig, ViTaminModel)
