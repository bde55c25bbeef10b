"""Loss terms of the tokenizer, unweighted. Images are fp32 in [0, 1], not clamped, outside of autocast.

Shapes: B batch, N visual tokens, D feature width.
"""

import torch
from torch import Tensor, nn


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error over all pixels (VQRAE Eq. 2, first term)."""
    return nn.functional.mse_loss(reconstruction, images)


def distillation_loss(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared error (B, N, D) to the frozen original encoder, on continuous features (VQRAE Eq. 5)."""
    return nn.functional.mse_loss(features.float(), teacher_features.float())


def generator_hinge_loss(fake_logits: Tensor) -> Tensor:
    """What the tokenizer minimises: the discriminator's logits on reconstructions should rise."""
    return -fake_logits.mean()


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises: real above 1, reconstructions below -1."""
    return 0.5 * (
        nn.functional.relu(1 - real_logits).mean() + nn.functional.relu(1 + fake_logits).mean()
    )


class LeCam(nn.Module):
    """LeCam regularisation (arXiv 2104.03310): logits stay near the running mean of the *other* class.

    Args:
        decay: of the running means of batch-mean logits.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self._observed: list[Tensor] = []
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """`relu(E[D(real)] - fake_mean)^2 + relu(real_mean - E[D(fake)])^2`, a scalar."""
        real, fake = real_logits.mean(), fake_logits.mean()
        return (
            nn.functional.relu(real - self.fake_mean).square()
            + nn.functional.relu(self.real_mean - fake).square()
        )

    def observe(self, real_logits: Tensor, fake_logits: Tensor) -> None:
        """Take note of the logits of one micro-batch."""
        self._observed.append(torch.stack([real_logits.mean(), fake_logits.mean()]).detach())

    def take_means(self) -> Tensor:
        """The means (2,) of real and fake logits over what was observed since the last call."""
        means = torch.stack(self._observed).mean(0)
        self._observed.clear()
        return means

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move the running means towards the batch means (over all processes) of one discriminator step."""
        self.real_mean.lerp_(real_mean, 1 - self.decay)
        self.fake_mean.lerp_(fake_mean, 1 - self.decay)
