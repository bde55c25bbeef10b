"""Image-text contrastive losses over the pairs of all processes.

A process scores its own rows against those of every process, so the mean of the losses over
processes, and of their gradients, is that of one process with all rows. Rows without a caption
take no part.

Shapes: B rows of this process, R rows of all, N visual tokens, D feature width, T tokens of a text,
P width of an embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqrae.common.distributed import gather_rows, world_size
from vqrae.tokenizer.modeling import VQRAEModel


def contrastive_loss(
    model: VQRAEModel, features: Tensor, tokens: dict[str, Tensor], captioned: Tensor
) -> Tensor:
    """The loss between `quantized_features` (B, N, D) and captions, see `pair_loss`.

    Args:
        tokens: `input_ids` and `attention_mask` (B, T).
        captioned: (B,) bool.
    """
    images, texts = model.image_embeddings(features), model.text_embeddings(**tokens)
    bias = getattr(model, "logit_bias", None)
    return pair_loss(model.config.contrastive, images, texts, captioned, model.logit_scale, bias)


def pair_loss(
    kind: str,
    images: Tensor,
    texts: Tensor,
    captioned: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """The loss of this process, a scalar; 0 where no row of any process has a caption.

    Args:
        kind: `softmax` (CLIP, arXiv 2103.00020): each image chooses among all texts, each text
            among all images; `sigmoid` (SigLIP, arXiv 2303.15343): every pair is judged alone.
        images, texts: (B, P), of length 1.
        captioned: (B,) bool; False where the text says nothing of the image.
        logit_scale: natural logarithm of the factor on cosines.
        logit_bias: of `sigmoid`.
    """
    rank = torch.distributed.get_rank() if world_size() > 1 else 0
    own_B = torch.arange(len(images), device=images.device) + rank * len(images)
    captioned_R = gather_rows(captioned.to(torch.uint8)).bool()
    with torch.autocast(images.device.type, enabled=False):
        images, texts = images.float(), texts.float()
        scale = logit_scale.float().exp()
        per_image_BR = scale * images @ gather_rows(texts).T
        if kind == "sigmoid":
            assert logit_bias is not None, "the model of a sigmoid loss has a bias"
            is_own_BR = own_B[:, None] == torch.arange(len(captioned_R), device=images.device)
            losses_BR = sigmoid_losses(per_image_BR + logit_bias, is_own_BR)
            losses_B = (losses_BR * captioned_R).sum(1)
        else:
            per_text_BR = scale * texts @ gather_rows(images).T
            both = torch.cat([per_image_BR, per_text_BR])
            # Finite: where nothing is left to choose from, the gradient is 0 instead of NaN.
            both = both.masked_fill(~captioned_R, -1e9)
            losses = F.cross_entropy(both, own_B.repeat(2), reduction="none")
            losses_B = losses.view(2, -1).mean(0)
        total = captioned_R.sum().clamp(min=1)
        return torch.where(captioned, losses_B, 0).sum() * world_size() / total


def sigmoid_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """The loss of every pair, of the shape of `logits`: whether image and text belong together."""
    return -F.logsigmoid(torch.where(truth, logits, -logits))
