"""What a training configuration takes of each GPU, by number of GPUs and ZeRO stage: `vqrae plan CONFIG`.

Nothing is downloaded or computed: models are built from the configuration alone, without weights (`vqrae.planning.empty_models`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrae.common.config import ConfigError, did_you_mean, load_config
from vqrae.common.files import markdown_table
from vqrae.common.memory import (
    GIB,
    PLANNING_ATTENTION,
    Activations,
    count_parameters,
    measure_activations,
    state_bytes,
    weight_bytes,
)
from vqrae.common.trainer import OptimizationConfig
from vqrae.generation.config import GeneratorConfig, TrainingConfig
from vqrae.generation.modeling import VisualHead, VisualVocabulary, build_generator
from vqrae.generation.train import visual_loss
from vqrae.planning.empty_models import (
    build_like,
    config_folder,
    empty_llava,
    llm_config,
    tokenizer_config,
)
from vqrae.quickstart.pretrain_encoder import EncoderPretrainingConfig
from vqrae.quickstart.train_llm import TinyLLMConfig
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.discriminator import build_discriminator
from vqrae.tokenizer.engine import set_trainable
from vqrae.tokenizer.perceptual import build_perceptual
from vqrae.understanding.train import STAGES, Stage, TrainConfig, freeze

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
USABLE = (
    0.92  # of a GPU's memory: the rest is CUDA's context, communication buffers and fragmentation
)
CHAT_TOKENS = 12  # of the chat template around a caption, and BOI
READERS: dict[str, tuple[type, ...]] = {
    "understanding": (TrainConfig, TinyLLMConfig),
    "tokenizer": (TokenizerTrainConfig, EncoderPretrainingConfig),
    "generation": (GeneratorConfig,),
}


@dataclass(frozen=True)
class Job:
    """One training of a configuration.

    Attributes:
        parts: parameters (all, trained) by name.
        weights, weights_under_zero: bytes of all weights without and with ZeRO, whose weights may be 16-bit.
        aside: bytes of frozen networks that no engine partitions.
        gradient_bytes: of one gradient under ZeRO.
        activations: of `micro_batch_size` samples.
        zero, zeros: what the configuration says, what the engine offers.
    """

    name: str
    parts: dict[str, tuple[int, int]]
    trained: int
    weights: int
    weights_under_zero: int
    gradient_bytes: int
    activations: Activations
    checkpointing: bool
    micro_batch_size: int
    global_batch_size: int
    zero: int
    aside: int = 0
    zeros: tuple[int, ...] = (0, 1, 2, 3)

    def memory(self, *, gpus: int, zero: int, micro_batch_size: int | None = None) -> float:
        """Bytes on each GPU."""
        weights, gradient_bytes = (
            (self.weights_under_zero, self.gradient_bytes) if zero else (self.weights, 4)
        )
        state = state_bytes(
            weights, self.trained, zero=zero, gpus=gpus, gradient_bytes=gradient_bytes
        )
        kept = self.activations.checkpointed if self.checkpointing else self.activations.whole
        return (
            state
            + self.aside
            + kept * (micro_batch_size or self.micro_batch_size) / self.micro_batch_size
        )

    def largest_micro_batch(self, *, gpus: int, zero: int, budget: float) -> int | None:
        """The largest micro-batch that fits, up to the configuration's, and divides each GPU's share of the global batch."""
        share, remainder = divmod(self.global_batch_size, gpus)
        if remainder:
            return None
        sizes = (
            size for size in range(min(self.micro_batch_size, share), 0, -1) if share % size == 0
        )
        return next(
            (s for s in sizes if self.memory(gpus=gpus, zero=zero, micro_batch_size=s) <= budget),
            None,
        )


def plan(name: str, overrides: Sequence[str] = ()) -> list[Job]:
    """The trainings of a configuration.

    Args:
        name: shipped YAML such as `vicuna_7b`, `tokenizer/tiny` where several packages have it, or a file of one's own.

    Raises:
        ConfigError: for a name that is not known or not unique, and a file that no training reads.
        ValueError: for a run or model whose shapes cannot be known on this machine.
    """
    config = read_plan_config(name, overrides)
    if isinstance(config, TrainConfig):
        return [
            _understanding_job(config, stage)
            for stage in (STAGES if config.stage == "both" else (config.stage,))
        ]
    if isinstance(config, TokenizerTrainConfig):
        return [
            _tokenizer_job(config, number)
            for number in ([1, 2] if config.stage == "both" else [config.stage])
        ]
    if isinstance(config, GeneratorConfig):
        return [_generation_job(config.training)]
    raise ValueError(
        f"{name} trains a model of a few million parameters on one CPU: there is nothing to plan"
    )


def read_plan_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration of that name, as the dataclass that reads it; see `plan`."""
    if name.endswith((".yaml", ".yml")):
        candidates = [(cls, Path(name)) for classes in READERS.values() for cls in classes]
    else:
        package, _, stem = name.rpartition("/")
        shipped = {
            f"{p}/{file.stem}": file for p in READERS for file in config_folder(p).glob("*.yaml")
        }
        found = [
            key for key in shipped if key == name or (not package and key.endswith(f"/{stem}"))
        ]
        if len(found) != 1:
            problem = (
                f"is one of {', '.join(found)}: say which"
                if found
                else f"is unknown. {did_you_mean(name, shipped)}"
            )
            raise ConfigError(f"config {name!r} {problem}")
        candidates = [(cls, shipped[found[0]]) for cls in READERS[found[0].partition("/")[0]]]
    problems = []
    for cls, path in candidates:
        changes = (
            [f"training.{change}" for change in overrides] if cls is GeneratorConfig else overrides
        )
        try:
            return load_config(cls, path, changes)
        except ConfigError as error:
            problems.append(error)
    raise min(problems, key=lambda error: str(error).count("\n"))  # of the reader that it fits best


# ---- trainings


def _understanding_job(config: TrainConfig, stage: Stage) -> Job:
    eyes, model = tokenizer_config(config.tokenizer), empty_llava(config)
    vision = model.config.vision_config
    optimization: OptimizationConfig = getattr(config, stage)
    freeze(model, stage)
    samples, text = optimization.micro_batch_size, max(config.max_length - eyes.grid_size**2, 1)

    def forward() -> Tensor:
        features = torch.empty(samples, eyes.grid_size**2, vision.hidden_size, dtype=torch.bfloat16)
        ids = torch.zeros(samples, text, dtype=torch.int64)
        embedded = torch.cat(
            [model.model.multi_modal_projector(features), model.get_input_embeddings()(ids)], dim=1
        )
        hidden = model.model.language_model(
            inputs_embeds=embedded, use_cache=False
        ).last_hidden_state
        logits, labels = (
            model.lm_head(hidden[:, -text:]),
            torch.zeros_like(ids),
        )  # image tokens need no logits
        return model.loss_function(logits, labels, logits.shape[-1])

    inner = model.model
    parts = {"encoder": inner.vision_tower, "projector": inner.multi_modal_projector}
    parts |= {"language model": nn.ModuleList([inner.language_model, model.lm_head])}
    return _trainer_job(f"understanding, {stage}", model, parts, optimization, forward)


def _generation_job(config: TrainingConfig) -> Job:
    eyes = tokenizer_config(config.tokenizer)
    vocabulary = VisualVocabulary(
        offset=config.model.offset, codebook_size=eyes.codebook_size, num_codes=eyes.grid_size**2
    )
    values = config.model.llm_config
    if config.model.llm is not None:
        values = llm_config(config.model.llm).to_diff_dict()
        values = {
            key: value
            for key, value in values.items()
            if key not in ("vocab_size", "model_type", "dtype")
        }
    with torch.device("meta"):
        model = build_generator(vocabulary, llm_config=values, attention=PLANNING_ATTENTION).to(
            torch.bfloat16
        )
    if not config.full_vocabulary_loss:
        model.lm_head = VisualHead(model.lm_head, vocabulary.code_rows)
    length = min(
        config.model.max_length,
        config.model.max_caption_tokens + CHAT_TOKENS + vocabulary.num_codes,
    )
    shape = (config.optimization.micro_batch_size, length)

    def forward() -> Tensor:
        ids = torch.zeros(shape, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids}
        return visual_loss(model, batch, vocabulary, full_vocabulary=config.full_vocabulary_loss)

    return _trainer_job(
        "generation", model, {"language model": model}, config.optimization, forward
    )


def _trainer_job(
    name: str,
    model: nn.Module,
    parts: dict[str, nn.Module],
    optimization: OptimizationConfig,
    forward: Callable[[], Tensor],
) -> Job:
    """A job on the `Trainer`: under DeepSpeed weights and gradients are bf16 beside fp32 masters, else weights are fp32."""
    parameters, trained = count_parameters(model)
    size = 2 if optimization.bf16 else 4
    extra = optimization.extra
    return Job(
        name=name,
        parts={key: count_parameters(part) for key, part in parts.items()}
        | {"total": (parameters, trained)},
        trained=trained,
        weights=4 * parameters,
        weights_under_zero=size * parameters,
        gradient_bytes=size,
        activations=measure_activations(forward, model),
        checkpointing=bool(
            extra.get("gradient_checkpointing") or extra.get("activation_checkpointing")
        ),
        micro_batch_size=optimization.micro_batch_size,
        global_batch_size=optimization.global_batch_size,
        zero=optimization.zero,
    )


def _tokenizer_job(config: TokenizerTrainConfig, number: int) -> Job:
    stage = config.stage_config(number)
    model = build_like(config.model)
    size, output_size = model.config.image_size, model.config.output_size
    set_trainable(model, stage)
    aside: dict[str, nn.Module] = {}
    discriminator: nn.Module | None = None
    with torch.device("meta"):
        if stage.needs_teacher:
            aside["teacher"] = build_like(config.model).encoder.to(
                torch.bfloat16 if config.bf16 else torch.float32
            )
            aside["teacher"].requires_grad_(False)
        if stage.perceptual_weight:
            teacher: Any = aside.get("teacher")
            aside["perceptual network"] = build_perceptual(
                stage.perceptual_network,
                stage.perceptual_mix,
                teacher=teacher,
                normalize=model.normalize,
                random=True,
            )
        if stage.adversarial_weight:
            channels = stage.discriminator_channels
            discriminator = build_discriminator(
                stage.discriminator, channels=channels, random_backbone=True
            )
    trained_modules = nn.ModuleList([model, *([discriminator] if discriminator else [])])
    weights, (_, trained) = weight_bytes(trained_modules), count_parameters(trained_modules)
    parts = {"encoder": model.encoder, "decoder": model.decoder, "tokenizer, total": model, **aside}
    if discriminator is not None:
        parts["discriminator"] = discriminator
    counts = {key: count_parameters(part) for key, part in parts.items()}
    resident = sum(weight_bytes(part) for part in aside.values())

    def forward() -> Tensor:
        images = torch.empty(stage.micro_batch_size, 3, size, size)
        targets = torch.empty(stage.micro_batch_size, 3, output_size, output_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            features = model.encode_features(images, check=False)
            # Without the search for codes, which looks at values; what the quantizer keeps is small beside the rest.
            reconstruction = model.decoder(model.out_proj(model.project(features))).float()
            losses = [F.mse_loss(reconstruction, targets)]
            if stage.distillation_weight:
                losses.append(
                    F.mse_loss(features.float(), torch.empty_like(features, dtype=torch.float32))
                )
            if "perceptual network" in aside:
                losses.append(aside["perceptual network"](reconstruction, targets))
            if discriminator is not None:
                losses.append(discriminator(reconstruction).mean())
        return torch.stack([loss.float() for loss in losses]).sum()

    everything = nn.ModuleList([trained_modules, *aside.values()])
    return Job(
        name=f"tokenizer, stage {number}",
        parts=counts,
        trained=trained,
        weights=weights,
        weights_under_zero=weights,
        gradient_bytes=4,
        activations=measure_activations(forward, everything),
        checkpointing=config.activation_checkpointing,
        micro_batch_size=stage.micro_batch_size,
        global_batch_size=stage.global_batch_size,
        zero=config.zero,
        aside=resident,
        zeros=(0, 1, 2),
    )


# ---- for people


def render(job: Job, *, gpus: Sequence[int], gpu_memory: float) -> str:
    """The plan of a job.

    Args:
        gpu_memory: GB of one GPU.
    """
    budget = USABLE * gpu_memory * GIB
    kept = job.activations.checkpointed if job.checkpointing else job.activations.whole
    other = job.activations.whole if job.checkpointing else job.activations.checkpointed
    lines = [
        f"----- {job.name}: global batch {job.global_batch_size:,}, micro-batch {job.micro_batch_size}, zero={job.zero} -----",
        f"{'parameters':24}{'all':>16}{'trained':>16}",
        *(f"  {name:22}{total:16,}{trained:16,}" for name, (total, trained) in job.parts.items()),
        f"activations of a micro-batch: {kept / GIB:.1f} GiB, activation checkpointing is "
        f"{'on' if job.checkpointing else 'off'} ({other / GIB:.1f} with it {'off' if job.checkpointing else 'on'})",
        f"GiB on each GPU; * is the configuration's own; ! is more than {USABLE:.0%} of {gpu_memory:g} GB",
        "",
    ]
    header = [
        "GPUs",
        *(f"zero={zero}" for zero in job.zeros),
        "accumulation",
        f"what fits at zero={job.zero}",
    ]
    rows = []
    for count in gpus:
        cells = []
        for zero in job.zeros:
            need = job.memory(gpus=count, zero=zero)
            cells.append(
                f"{need / GIB:.1f}{'!' if need > budget else ''}{'*' if zero == job.zero else ''}"
            )
        rows.append(
            [
                str(count),
                *cells,
                _accumulation(job, count, job.micro_batch_size),
                _advice(job, count, budget),
            ]
        )
    return "\n".join([*lines, *markdown_table(header, rows)])


def _accumulation(job: Job, gpus: int, micro_batch_size: int) -> str:
    steps, remainder = divmod(job.global_batch_size, micro_batch_size * gpus)
    return "does not divide" if remainder else str(steps)


def _advice(job: Job, gpus: int, budget: float) -> str:
    micro = job.largest_micro_batch(gpus=gpus, zero=job.zero, budget=budget)
    if micro is not None:
        return f"micro-batch {micro}, accumulation {_accumulation(job, gpus, micro)}"
    for zero in job.zeros:
        if zero > job.zero and (
            micro := job.largest_micro_batch(gpus=gpus, zero=zero, budget=budget)
        ):
            return f"only zero={zero}, micro-batch {micro}"
    return "nothing" if job.global_batch_size % gpus == 0 else "does not divide"
