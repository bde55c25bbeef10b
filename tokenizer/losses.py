"""Loss terms of the tokenizer, unweighted, and the networks that some of them need.

Images are fp32 in [0, 1], not clamped, and compared outside of autocast.

Shapes: B batch, N visual tokens, D feature width.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vqrae.common.distributed import is_main_process, sum_over_processes, world_size
from vqrae.common.files import atomic_path
from vqrae.tokenizer.config import StageConfig, TokenizerTrainConfig
from vqrae.tokenizer.discriminator import build_discriminator
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.modeling import VQRAEModel, VQRAEOutput
from vqrae.tokenizer.perceptual import build_perceptual


def distillation_loss(features_BND: Tensor, teacher_features_BND: Tensor) -> Tensor:
    """Mean squared error to the features of the frozen original encoder (VQRAE Eq. 5)."""
    return F.mse_loss(features_BND.float(), teacher_features_BND.float())


class AlignmentHeads(nn.ModuleList):
    """Linear maps from quantized features to layers of the teacher; of no use after training.

    A map that could do more would find in the codes what nothing else finds there.

    Without layers it has no parameters.
    """

    def __init__(self, layers: Sequence[int], width: int) -> None:
        super().__init__(nn.Linear(width, width) for _ in layers)

    def forward(self, quantized_BND: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Mean squared error to the layer-normalised features (B, N, D) of each layer, their mean.

        Without the normalisation the layer with the largest features would be all that counts.
        """
        losses = []
        for head, target_BND in zip(self, targets, strict=True):
            target_BND = F.layer_norm(target_BND.float(), target_BND.shape[-1:])
            losses.append(F.mse_loss(head(quantized_BND).float(), target_BND))
        return torch.stack(losses).mean()


def teacher_losses(
    stage: StageConfig,
    model: VQRAEModel,
    teacher: PreTrainedModel,
    alignment: AlignmentHeads,
    images: Tensor,
    output: VQRAEOutput,
) -> dict[str, Tensor]:
    """What compares with features of the original encoder, by name, from one pass through it."""
    tap, layers = model.config.feature_tap, stage.alignment_layers
    with torch.no_grad():
        features = encoder_features(teacher, model.normalize(images), tap, layers)
    target_BND, *targets = features.split(model.config.feature_dim, dim=-1)
    losses = {}
    if stage.distillation_weight:
        losses["distillation_loss"] = distillation_loss(output.features, target_BND)
    if layers:
        losses["alignment_loss"] = alignment(output.quantized_features, targets)
    return losses


# -------------------------------------------------------------------------------------- adversarial


def generator_hinge_loss(fake_logits: Tensor) -> Tensor:
    """What the tokenizer minimises: the discriminator's logits of reconstructions should rise."""
    return -fake_logits.mean()


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises: real images above 1, reconstructions below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def consistency_loss(
    real_logits: Tensor, fake_logits: Tensor, real_again: Tensor, fake_again: Tensor
) -> Tensor:
    """Balanced consistency (arXiv 2002.04724) of logits of two augmentations, as UniTok has it.

    Both sides have a gradient.
    """
    return F.mse_loss(real_again, real_logits) + F.mse_loss(fake_again, fake_logits)


def adaptive_weight(
    image_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, limits: tuple[float, float]
) -> Tensor:
    """The factor on the adversarial loss that makes both pull equally at the last layer (VQGAN).

    UniTok takes each process's own gradients; here they are the means of all, so that the number of
    processes does not matter.

    Args:
        last_layer: weights of the decoder's last layer.
        limits: of the factor.
    """
    gradients: list[Tensor] = []
    for loss in (image_loss, adversarial_loss):
        gradients += torch.autograd.grad(loss, last_layer, retain_graph=True)
    both = sum_over_processes(torch.stack(gradients)) / world_size()
    pull, push = both.flatten(1).norm(dim=1)
    return (pull / (push + 1e-6)).clamp(*limits)


class LeCam(nn.Module):
    """LeCam (arXiv 2104.03310): logits stay near the running mean of the *other* class.

    Args:
        decay: of the running means of batch-mean logits.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """`relu(E[D(real)] - fake_mean)^2 + relu(real_mean - E[D(fake)])^2`, a scalar."""
        real_term = F.relu(real_logits.mean() - self.fake_mean).square()
        fake_term = F.relu(self.real_mean - fake_logits.mean()).square()
        return real_term + fake_term

    @torch.no_grad()
    def update(self, means: Tensor, *, taken: Tensor) -> None:
        """Move the running means after one step of the discriminator.

        Args:
            means: (2,) mean logits of real images and reconstructions, over all processes.
            taken: bool scalar; False where the step was skipped, whose logits may be NaN.
        """
        for running, mean in zip((self.real_mean, self.fake_mean), means, strict=True):
            running.lerp_(torch.where(taken, mean, running), 1 - self.decay)


# ----------------------------------------------------------------------------------------- networks


class LossNetworks(NamedTuple):
    """The other networks of a stage; None where the weight of their loss is 0."""

    teacher: PreTrainedModel | None
    perceptual: nn.Module | None
    discriminator: Any


def build_loss_networks(
    config: TokenizerTrainConfig,
    stage: StageConfig,
    model: VQRAEModel,
    original: Path,
    device: torch.device,
) -> LossNetworks:
    """The networks that judge a reconstruction, on `device`.

    Args:
        model: the tokenizer as it enters the stage.
        original: file of `keep_original_encoder`, which may not exist.
    """
    teacher = perceptual = discriminator = None
    if stage.needs_teacher:
        teacher = build_teacher(model.encoder, original, bf16=config.bf16)
    if stage.perceptual_weight:
        perceptual = build_perceptual(
            stage.perceptual_network,
            stage.perceptual_mix,
            teacher=teacher,
            normalize=model.normalize,
            folder=config.perceptual_weights,
            random=config.random_perceptual_weights,
        ).to(device)
    if stage.adversarial_weight:
        discriminator = build_discriminator(
            stage.discriminator,
            channels=stage.discriminator_channels,
            backbone=stage.discriminator_backbone,
            random_backbone=config.random_perceptual_weights,
        ).to(device)
    return LossNetworks(teacher, perceptual, discriminator)


def keep_original_encoder(encoder: PreTrainedModel, file: Path, *, tuned: bool) -> None:
    """Write the encoder that stage 1 starts from if it will be tuned; else remove another run's.

    Stage 2 distils from the untuned encoder. A stage 1 that freezes its encoder hands it on itself.
    """
    if not is_main_process():
        return
    file.unlink(missing_ok=True)
    if tuned:
        with atomic_path(file) as temporary:
            save_file(encoder.state_dict(), temporary)


def build_teacher(encoder: PreTrainedModel, original: Path, *, bf16: bool) -> PreTrainedModel:
    """A frozen copy of the original encoder.

    Args:
        encoder: as it enters the stage, before a checkpoint is loaded.
        original: file of `keep_original_encoder`; where there is none, `encoder` is the original.
        bf16: store matrices in bf16, in which autocast multiplies anyway: half the memory, the same
            features.
    """
    teacher = copy.deepcopy(encoder).eval().requires_grad_(False)
    if original.exists():
        teacher.load_state_dict(load_file(original))
    for module in teacher.modules() if bf16 else ():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bfloat16()
    return teacher
