"""A moving average of a model's weights, which often reconstructs better than the weights themselves."""

import copy
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel


class WeightAverage:
    """Exponential moving average of weights (torch's own `AveragedModel` waits for the device at every update).

    Its count of updates lies in the averaged model's configuration, so a saved average is complete by itself.

    Args:
        model: what is averaged; the average is a whole model of its own, `self.model`.
        decay: of the average. It grows towards this as (1 + t) / (10 + t), so that the start is soon forgotten.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = self.model.config.ema_decay = decay
        self.model.config.ema_updates = 0

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Move the average towards the weights; buffers are copied. The first update is a copy."""
        updates = self.model.config.ema_updates
        decay = min(self.decay, updates / (9 + updates))
        get_ema_multi_avg_fn(decay)(
            list(self.model.parameters()), list(model.parameters()), updates
        )
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.model.config.ema_updates += 1

    def load(self, folder: Path) -> None:
        """Go on from a saved average; the decay is the configuration's."""
        saved = type(self.model).from_pretrained(folder)
        self.model.load_state_dict(saved.state_dict())
        self.model.config.ema_updates = saved.config.ema_updates
