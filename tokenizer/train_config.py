"""The typed configuration of a tokenizer training: one YAML file with both stages (VQRAE Table 7)."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is built."""

    encoder: str | None
    """Run directory, checkpoint folder or hub id of the pretrained encoder; None with `encoder_config`: random."""
    encoder_config: dict[str, Any] | None = None
    """`model_type` and values of a randomly initialised encoder; for tests and dry runs."""
    feature_tap: str = "hidden_states[-1]"
    feature_norm: str = "none"
    quantizer: str = "simvq"
    quantizer_options: dict[str, Any] = field(default_factory=dict)
    codebook_size: int = 16384
    codebook_dim: int = 1536
    codebook_init: Literal["random", "features"] = "random"
    """`random` is the quantizer's published start; `features` takes k-means centres of projected encoder features."""
    output_patch_size: int | None = None
    output_basis: str = "pixels"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it learns from."""

    train: str = "scenes"
    """A source: `scenes`, `scenes:emoji`, an image folder, a caption file, tars."""
    validation: str | None = None
    """None: the validation split of `train`."""
    num_workers: int = 0
    random_flip: bool = True


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One column of Table 7."""

    max_steps: int
    global_batch_size: int
    micro_batch_size: int
    """Pictures of one forward pass on one process; accumulation is computed."""
    freeze_encoder: bool
    decoder_lr: float
    """Of everything but encoder, quantizer and discriminator."""
    end_lr: float
    """What the cosine takes `decoder_lr` to; other rates keep their ratio to it."""
    encoder_lr: float = 0.0
    quantizer_lr: float | None = None
    """None: `decoder_lr`. A faster quantizer than encoder empties the codebook."""
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    reconstruction_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    index_weight: float = 1.0
    """Of the quantizer `ibq`, as is the next; 1 is published, with codebook_weight 0.25 and commitment_weight 1."""
    entropy_weight: float = 0.0
    """0: not even computed. Published: 0.05."""
    perceptual_weight: float = 0.0
    perceptual_network: str = "encoder"
    distillation_weight: float = 0.0
    adversarial_weight: float = 0.0
    discriminator_start: int = 0
    """Stage step of the discriminator's first update; it is not run before."""
    discriminator_ramp: int = 0
    """Steps over which the adversarial weight grows from 0."""
    discriminator_lr: float = 0.0
    discriminator_channels: tuple[int, ...] = (128, 128, 256, 512)
    lecam_weight: float = 0.001
    bypass_steps: int = 0
    """The first steps of the stage train a continuous autoencoder; the codebook then starts anew from its features."""
    revival_interval: int = 0
    """Every so many steps, codes that were not chosen since the last time move onto features; 0: never."""
    revival_until: float = 0.8
    """Share of the stage after which nothing is revived any more."""

    def __post_init__(self) -> None:
        if self.adversarial_weight and not self.discriminator_lr:
            raise ValueError("adversarial_weight is set but discriminator_lr is 0: the discriminator would never learn")
        if not self.freeze_encoder and not self.encoder_lr:
            raise ValueError("the encoder is not frozen but encoder_lr is 0: set encoder_lr or freeze_encoder")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """A tokenizer run."""

    output_dir: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    stage1: StageConfig
    stage2: StageConfig
    stage: Literal[1, 2, "both"] = "both"
    zero: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage; 0 is plain DDP."""
    bf16: bool = True
    attention: str = "auto"
    seed: int = 0
    log_steps: int = 10
    save_steps: int = 200
    keep_checkpoints: int = 1
    sample_steps: int = 100
    """Write a picture grid of validation reconstructions every so many steps."""
