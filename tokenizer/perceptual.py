"""Perceptual distances by name: networks that never train and never start from random weights.

`encoder` compares the features that the frozen original encoder sees. It needs no download, which is why the embedded
default uses it; the same network is then encoder, teacher and loss, so it is never a *metric* beside them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vqrae.common.config import did_you_mean


class EncoderPerceptual(nn.Module):
    """Mean squared distance of the encoder's hidden states, each layer-normalised, averaged over layers."""

    def __init__(self, encoder: PreTrainedModel, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.normalize = encoder, normalize

    def _states(self, images: Tensor) -> list[Tensor]:
        states = self.encoder(self.normalize(images), output_hidden_states=True).hidden_states[1:]
        return [nn.functional.layer_norm(state.float(), state.shape[-1:]) for state in states]

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Scalar distance of pictures (B, 3, H, W) in [0, 1]; gradient through the reconstruction only."""
        with torch.no_grad():
            targets = self._states(images)
        pairs = zip(self._states(reconstruction), targets, strict=True)
        return torch.stack([nn.functional.mse_loss(state, target) for state, target in pairs]).mean()


PERCEPTUAL_NETWORKS = {"encoder": EncoderPerceptual}


def build_perceptual(name: str, teacher: PreTrainedModel, normalize: Callable[[Tensor], Tensor]) -> nn.Module:
    """The perceptual network of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in PERCEPTUAL_NETWORKS:
        raise ValueError(f"unknown perceptual network {name!r}. {did_you_mean(name, PERCEPTUAL_NETWORKS)}")
    return PERCEPTUAL_NETWORKS[name](teacher, normalize)
