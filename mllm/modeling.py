"""The unified model: a language model that reads and predicts codes and text (UniTok, section 4.3).

Images enter as the vectors of their codes: the tokenizer's frozen codebooks, a trained causal copy
of its output projection, an MLP. The state before a position opens the depth head that predicts the
codes of the position. One code a position (VQRAE) is the case n = 1 of the same parts.

Shapes: B rows, T places of a row, P images, D of them generated, N places and n codes of a place, M
trained text tokens, W width of the language model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.modeling_outputs import ModelOutput

from vqrae.generation.multi_code import MultiCodeConfig, MultiCodeModel


class UnifiedConfig(MultiCodeConfig):
    """Stored as `config.json`.

    Args:
        image_token_id: the id that marks a place of an image.
        end_of_image: the id of EOI; that of BOI is the `offset` of visual_vocabulary.
        visual_vocabulary: values of an `ImageVocabulary`.
        max_caption_tokens: ids of a caption with BOS and prompt.
        options: of `MultiCodeConfig`.
    """

    model_type = "vqrae_mllm"

    def __init__(
        self,
        image_token_id: int = 0,
        end_of_image: int = 4,
        visual_vocabulary: dict[str, int] | None = None,
        max_caption_tokens: int = 1750,
        **options: Any,
    ) -> None:
        self.image_token_id, self.end_of_image = image_token_id, end_of_image
        self.visual_vocabulary = dict(visual_vocabulary or {})
        self.max_caption_tokens = max_caption_tokens
        super().__init__(**options)

    @property
    def max_position_embeddings(self) -> int | None:
        """Places that the language model was made for."""
        return getattr(self.build_llm_config(), "max_position_embeddings", None)


@dataclass
class UnifiedOutput(ModelOutput):
    """Attributes:
    loss: of all targets.
    sums: (2,) losses of the codes and of the text, each summed over its targets; detached.
    """

    loss: Tensor | None = None
    sums: Tensor | None = None


class UnifiedModel(MultiCodeModel):
    """A language model with an embedding of codes and a depth head, for text and images.

    Attributes:
        encode_images: images uint8 (P, 3, H, W) -> codes, of the tokenizer; for `generate`.
    """

    config: UnifiedConfig
    config_class: type[PreTrainedConfig] = UnifiedConfig
    accepts_loss_kwargs = True  # `Trainer` counts the targets of a step
    encode_images: Callable[[Tensor], Tensor] | None = None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        codes: Tensor,
        image_places: Tensor,
        text_places: Tensor,
        text_targets: Tensor,
        generated: Tensor,
        num_image_codes: Tensor,
        num_targets: Tensor,
        num_items_in_batch: Tensor | None = None,
    ) -> UnifiedOutput:
        """The loss of a batch of `UnifiedCollator`, which says what the arguments are.

        The mean over codes and text tokens together, which is UniTok's (n_img CE_img + n_txt
        CE_txt) / (n_img + n_txt), where every code also has the z-loss of the head.

        Args:
            num_items_in_batch: the targets to take the mean over, by default those of the batch.
        """
        hidden_BTW = self.llm.base_model(
            inputs_embeds=self.embed(input_ids, codes, image_places),
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
        hidden = hidden_BTW.flatten(0, 1)
        logits = self.llm.get_output_embeddings()(hidden[text_places]).float()
        text_loss = F.cross_entropy(logits, text_targets, reduction="sum")
        # The state of the place before: BOI's for the first.
        opening = hidden[image_places[generated].flatten() - 1]
        image_loss = self.head.loss(opening, codes[generated].flatten(0, 1)) * num_image_codes
        count = num_targets if num_items_in_batch is None else num_items_in_batch
        sums = torch.stack([image_loss, text_loss])
        return UnifiedOutput(loss=sums.sum() / count.clamp(min=1), sums=sums.detach())

    def embed(self, input_ids: Tensor, codes: Tensor, image_places: Tensor) -> Tensor:
        """Input vectors (B, T, W) of ids (B, T), in whose places (P, N) are the codes of images."""
        places = image_places.flatten()
        # The id of `<image>` may have no row.
        ids = input_ids.flatten().index_fill(0, places, 0)
        text = self.get_input_embeddings()(ids)
        images = self.embedding(codes).flatten(0, 1).to(text.dtype)
        return text.index_copy(0, places, images).view(*input_ids.shape, -1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The ids (B, T) of prompts, padded in front, and of their answers.

        Args:
            pixel_values: (P, 3, H, W), the images, of 8 bits whatever their type.
            options: of transformers' `generate`.
        """
        if pixel_values is None:
            vectors = self.get_input_embeddings()(input_ids)
        else:
            assert self.encode_images is not None, "the model has no tokenizer"
            codes = self.encode_images(pixel_values.to(torch.uint8))
            places = torch.nonzero(input_ids.flatten() == self.config.image_token_id)
            vectors = self.embed(input_ids, codes, places.view(len(codes), -1))
        answers = self.llm.generate(inputs_embeds=vectors, attention_mask=attention_mask, **options)
        return torch.cat([input_ids, answers], dim=1)


AutoConfig.register(UnifiedConfig.model_type, UnifiedConfig)
AutoModel.register(UnifiedConfig, UnifiedModel)
