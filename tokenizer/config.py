"""The configuration of a tokenizer training: one YAML file with its stages (VQRAE Table 7)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vqrae.common.config import check_range
from vqrae.common.optim import warmup_cosine
from vqrae.common.run import RunConfig
from vqrae.data.samples import Crop


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is built."""

    encoder: str | None
    """Run directory, checkpoint folder or hub id of the pretrained encoder; None: a random one."""
    encoder_config: dict[str, Any] | None = None
    """`model_type` and values of the encoder: what the pretrained one must be (and a dry run builds
    where it is not on this machine), or what the random one is."""
    image_size: int | None = None
    """Pixels of a side; None: the encoder's. Another size resamples a SigLIP's position table."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """The encoder's normalisation of images: 0.5 for SigLIP2, ImageNet's for InternViT."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    feature_tap: str = "hidden_states[-1]"
    fused_layers: tuple[int, ...] = ()
    """Hidden states that the quantizer reads next to the features; 0: the embeddings. The features
    that a language model reads stay those of the tap (docs/beyond.md)."""
    feature_norm: str = "none"
    quantizer: str = "simvq"
    quantizer_options: dict[str, Any] = field(default_factory=dict)
    codebook_size: int = 16384
    """K, of each codebook."""
    codebook_dim: int = 1536
    """E, of the whole quantized vector."""
    num_codebooks: int = 1
    """n, the codes of a token."""
    projection: Literal["linear", "attention"] = "linear"
    """How features get into the code space and back."""
    projection_heads: int = 16
    """Of `attention`."""
    decoder: Literal["vit", "conv"] = "vit"
    """The encoder's blocks, or, for `vitamin`, they and its convolutions in mirrored order."""
    codebook_init: Literal["random", "gaussian", "features"] = "random"
    """`random` is the quantizer's published start; `features`: k-means of projected features;
    `gaussian`: random vectors with their mean and covariance."""
    output_patch_size: int | None = None
    """Pixels of a side of a decoded patch; None: the encoder's. 16 makes InternViT's 448 px 512."""
    output_basis: str = "pixels"
    text_config: dict[str, Any] | None = None
    """Fields of `CLIPTextConfig`: the text tower of a contrastive loss; None: none."""
    text_tokenizer: str | None = None
    """Folder or hub id of the tower's text tokenizer; None: the words of the training captions."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    """That loss: CLIP's, or SigLIP's."""

    def __post_init__(self) -> None:
        check_range(self, "codebook_size", "codebook_dim", "num_codebooks", low=1)
        check_range(self, "output_patch_size", "projection_heads", low=1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it learns from."""

    train: str = "scenes"
    """A source of images, see `vqrae.data.sources`."""
    validation: str | None = None
    """A source, which leaves all of `train` for training; None: hold out 5 % of `train`."""
    num_workers: int = 0
    random_flip: bool = True
    cutmix: float = 0.0
    """Share of training images with a rectangle of another image (CutMix), so that a code says what
    its patch shows and less what usually surrounds it."""
    crop: Crop = "center"
    """Of training images, see `vqrae.data.samples.fit_image`; VQRAE has `random` (Table 7), UniTok
    `resized`."""
    draft: bool = False
    """Decode JPEGs at the smallest eighth of their size that the crop needs: faster if large."""
    min_edge: int = 0
    """Leave out stored images whose shorter edge has fewer pixels."""
    max_aspect: float = 0.0
    """Leave out stored images with a larger ratio of longer to shorter edge; 0: none."""

    def __post_init__(self) -> None:
        check_range(self, "num_workers", "min_edge", "max_aspect", low=0)
        check_range(self, "cutmix", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One column of Table 7."""

    max_steps: int
    """0: the stage hands on what it starts from."""
    global_batch_size: int
    micro_batch_size: int
    """Images of one forward pass on one process; accumulation is computed."""
    freeze_encoder: bool
    decoder_lr: float
    """Of everything but encoder, quantizer, text side and discriminator."""
    end_lr: float
    """Where the cosine takes `decoder_lr`; other rates keep their ratio to it."""
    encoder_lr: float = 0.0
    text_lr: float | None = None
    """Of the text side; None: `decoder_lr`."""
    quantizer_lr: float | None = None
    """None: `decoder_lr`. A quantizer that learns faster than the encoder empties the codebook."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the tokenizer. `muon` orthogonalises updates of encoder and decoder matrices, scaled like
    AdamW's; under ZeRO, which cuts matrices into pieces, AdamW takes its place."""
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    reconstruction_weight: float = 1.0
    """Of the squared error of pixels in [0, 1]; in [-1, 1], as UniTok has them, 4 times as much."""
    l1_weight: float = 0.0
    """Of the absolute error of pixels in [0, 1]; in [-1, 1] twice as much."""
    reconstruction_batch: int | None = None
    """Images of a micro-batch that are decoded, the first ones; None: all."""
    contrastive_weight: float = 0.0
    """Of the loss between images and captions, which needs `model.text_config`. The pairs of one
    micro-batch of all processes are told apart, so accumulation makes it another loss."""
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    index_weight: float = 1.0
    """Of quantizer `ibq`, whose code has 1 here, codebook_weight 0.25 and commitment_weight 1."""
    entropy_weight: float = 0.0
    """Of quantizer `ibq`: 0.05 in public configurations. Where it is 0 the loss is not computed."""
    perceptual_weight: float = 0.0
    perceptual_network: str = "encoder"
    """`encoder`, `lpips`, `convnext_s` or several joined by `+`. Published: `lpips+convnext_s`, mix
    [1.0, 0.1], weight 1.1."""
    perceptual_mix: tuple[float, ...] = ()
    """One weight for each of several networks; their weighted mean is the loss."""
    distillation_weight: float = 0.0
    alignment_weight: float = 0.0
    """Of the error of linear maps from quantized features to the teacher's `alignment_layers`."""
    alignment_layers: tuple[int, ...] = ()
    """Hidden states of the teacher, 0 to its number of blocks, or from -1; see docs/beyond.md."""
    adversarial_weight: float = 0.0
    adaptive_weight: tuple[float, float] | None = None
    """Smallest and largest factor on it, which makes its pull at the decoder's last layer that of
    the image losses; None: 1. UniTok has [0.015, 1e4]."""
    discriminator: str = "maskbit"
    """`maskbit`, or heads on a frozen ViT: `dino` (StyleGAN-T's) or `dinov2` (UniTok's)."""
    discriminator_start: int = 0
    """Step of the discriminator's first update; it does not run before."""
    discriminator_ramp: int = 0
    """Steps over which the adversarial weight grows from 0."""
    discriminator_lr: float = 0.0
    discriminator_channels: tuple[int, ...] = (128, 128, 256, 512)
    """Of `maskbit`."""
    discriminator_backbone: str = "facebook/dino-vits16"
    """Folder or hub id of the frozen ViT of `dino` or `dinov2`."""
    discriminator_warmup_steps: int | None = None
    """None: `warmup_steps`."""
    discriminator_weight_decay: float | None = None
    """None: `weight_decay`."""
    discriminator_adam_betas: tuple[float, float] | None = None
    """None: `adam_betas`."""
    discriminator_weight: float = 1.0
    """Of its hinge loss, the mean of both kinds; 2, as in UniTok: their sum."""
    discriminator_augment: bool = False
    """Show it images with other places and colours, in part hidden (DiffAug) and cropped."""
    discriminator_blur_steps: int = 0
    """Steps from its start over which a blur of what it sees fades."""
    consistency_weight: float = 0.0
    """Of the change of its logits between two augmentations (balanced consistency)."""
    lecam_weight: float = 0.001
    bypass_steps: int = 0
    """First steps, of a continuous autoencoder; then the codebook starts from its features."""
    codebook_metric: Literal["features", "pixels"] = "features"
    """Distance of that codebook start: of projected features, or, in another basis of the code
    space, that of decoded images (`vqrae.tokenizer.codebook.measure_in_pixels`)."""
    revival_interval: int = 0
    """Steps after which codes that none of them chose move onto features; 0: never."""
    revival_until: float = 0.8
    """Share of the stage after which no code is moved any more."""

    def __post_init__(self) -> None:
        check_range(self, "global_batch_size", "micro_batch_size", "reconstruction_batch", low=1)
        check_range(self, "max_grad_norm", low=0, high=math.inf)
        check_range(self, "revival_until", low=0, high=1)
        others = {name for name, value in vars(self).items() if isinstance(value, int | float)}
        check_range(self, *sorted(others - {"max_grad_norm"}), low=0)
        if not self.decoder_lr:
            raise ValueError("decoder_lr: got 0, expected a rate that the others have a ratio to")
        if self.adversarial_weight and not self.discriminator_lr:
            raise ValueError("discriminator_lr: got 0 with adversarial_weight, set a positive rate")
        if not self.freeze_encoder and not self.encoder_lr:
            raise ValueError("encoder_lr: got 0, set a positive rate or freeze_encoder=true")
        if (self.alignment_weight > 0) != bool(self.alignment_layers):
            raise ValueError(
                f"got alignment_weight {self.alignment_weight} and alignment_layers "
                f"{list(self.alignment_layers)}: give both or none of them"
            )
        networks = self.perceptual_network.split("+")
        if len(self.perceptual_mix) != (len(networks) if len(networks) > 1 else 0):
            raise ValueError(
                f"perceptual_mix: got {list(self.perceptual_mix)} for perceptual_network "
                f"{self.perceptual_network!r}: give one weight for each of several networks, and "
                "none for a single one"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with the frozen original encoder."""
        if self.perceptual_weight and "encoder" in self.perceptual_network.split("+"):
            return True
        return self.distillation_weight > 0 or self.alignment_weight > 0

    def rate_factor(self, step: int) -> float:
        """Factor on the learning rates of the tokenizer: warm-up, then cosine."""
        return self._rate_factor(step, self.warmup_steps, self.max_steps)

    def discriminator_rate_factor(self, step: int) -> float:
        """The same for the discriminator, which counts steps from its start."""
        warmup, begin = self.discriminator_warmup_steps, self.discriminator_start
        warmup = self.warmup_steps if warmup is None else warmup
        return self._rate_factor(step - begin, warmup, self.max_steps - begin)

    @property
    def discriminator_optimization(self) -> "StageConfig":
        """These settings with the discriminator's own ones of AdamW in place of the tokenizer's."""
        decay, betas = self.discriminator_weight_decay, self.discriminator_adam_betas
        return replace(
            self,
            weight_decay=self.weight_decay if decay is None else decay,
            adam_betas=betas or self.adam_betas,
        )

    def _rate_factor(self, step: int, warmup: int, total: int) -> float:
        end = self.end_lr / self.decoder_lr
        return warmup_cosine(step, warmup_steps=warmup, total_steps=total, end=end)

    def adversarial_weight_at(self, step: int) -> float:
        """The adversarial weight at a step: 0 before `discriminator_start`, then the ramp."""
        begun = step - self.discriminator_start
        if begun < 0:
            return 0.0
        return self.adversarial_weight * min(1.0, (begun + 1) / max(1, self.discriminator_ramp))

    def blur_at(self, step: int) -> float:
        """The blur of what the discriminator sees at a step, from 1 to 0 (sharp)."""
        steps, begun = self.discriminator_blur_steps, step - self.discriminator_start
        return max(0.0, 1 - begun / steps) if steps else 0.0

    def is_revival(self, done: int) -> bool:
        """Whether unused codes are re-initialised after this number of steps."""
        within = self.bypass_steps < done <= self.revival_until * self.max_steps
        return within and self.revival_interval > 0 and done % self.revival_interval == 0


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(RunConfig):
    """A tokenizer run."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    stage1: StageConfig
    stage2: StageConfig | None = None
    """None: the training has one stage."""
    stage: Literal[1, 2, "both"] = "both"
    perceptual_weights: str | None = None
    """Folder with the weights of `lpips` and `convnext_s`; None: torch's cache, or a download."""
    random_perceptual_weights: bool = False
    """Random weights for them and for the backbone of `dino`: for dry runs and tests, because these
    losses then mean nothing."""
    zero: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage; 0 is plain DDP."""
    micro_batch_size: int | None = None
    """Replaces that of both stages, to fit another machine; the global batch stays."""
    bf16: bool = True
    tf32: bool = True
    """On CUDA, use TF32 for what bf16 leaves in fp32 (perceptual networks, projections,
    discriminator), except the search for codes, which is exact."""
    attention: str = "auto"
    activation_checkpointing: bool = False
    """Keep one state per block of encoder and decoder, recompute the rest: far less memory, a third
    more work."""
    compile: bool = False
    """`torch.compile` the blocks of encoder and decoder; gains nothing on CPU."""
    ema_decay: float = 0.0
    """Also keep a moving average of the weights, saved as `model_ema`; 0: none."""
    max_nonfinite_steps: int = 20
    """Steps in a row without a finite gradient, each of them skipped, after which the newest
    checkpoint is loaded."""
    dry_run: int = 0
    """Run this number of steps on scenes, keep nothing, report parameters, memory and time."""
    log_steps: int = 10
    save_steps: int = 200
    keep_checkpoints: int = 1
    sample_steps: int = 100
    """Steps between image grids of validation reconstructions."""

    def __post_init__(self) -> None:
        check_range(self, "micro_batch_size", "max_nonfinite_steps", low=1)
        check_range(self, "log_steps", "save_steps", "sample_steps", "keep_checkpoints", low=1)
        check_range(self, "dry_run", low=0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay: got {self.ema_decay}, expected 0 for none or a number below 1"
            )
        if self.stage == 2 and self.stage2 is None:
            raise ValueError("stage: got 2, but this training has one stage: set stage=1")
        weights = [self.stage_config(number).contrastive_weight for number in self.all_stages]
        if any(weights) != (self.model.text_config is not None):
            raise ValueError(
                f"got contrastive_weight {max(weights)} and model.text_config "
                f"{self.model.text_config}: give both, or set contrastive_weight=0 and "
                "model.text_config= (empty)"
            )

    @property
    def all_stages(self) -> tuple[int, ...]:
        """Numbers of the stages that there are, in order."""
        return (1,) if self.stage2 is None else (1, 2)

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of the stages to run, in order."""
        return self.all_stages if self.stage == "both" else (self.stage,)

    def stage_config(self, number: int) -> StageConfig:
        """The settings of stage 1 or 2, with what the run overrides in both."""
        stage = self.stage1 if number == 1 else self.stage2
        assert stage is not None, "one of all_stages"
        if self.micro_batch_size is None:
            return stage
        return replace(stage, micro_batch_size=self.micro_batch_size)
