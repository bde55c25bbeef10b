"""The tokenizer's `dry_run=N`: its stages on rendered scenes (see `vqrae.common.dry_run`).

The discriminator takes part from the first step on; the global batch is one micro-batch of every
process. A last step is then logged, previewed, saved and restored.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.trainer_utils import set_seed

from vqrae.common.checkpoints import resolve_model
from vqrae.common.config import ConfigError, load_config, shipped_config, shipped_names
from vqrae.common.distributed import attention_implementation, is_main_process, world_size
from vqrae.common.dry_run import (
    GIB,
    KNOWN_MODELS,
    Report,
    Watch,
    is_here,
    known_config,
    rehearse,
    scratch_folder,
    stand_in,
)
from vqrae.common.run import open as open_run
from vqrae.data.sources import open_images
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.tokenizer.build import build_tokenizer, first_model
from vqrae.tokenizer.config import ModelConfig, TokenizerTrainConfig
from vqrae.tokenizer.configuration import FEATURE_TAPS, VQRAEConfig
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.losses import distillation_loss
from vqrae.tokenizer.modeling import VQRAEModel

# `train_stage` of `vqrae.tokenizer.train`.
TrainStage = Callable[..., Generator[int, None, None]]


def dry_run(config: TokenizerTrainConfig, train_stage: TrainStage) -> list[Report]:
    """Rehearse the configured stages one after the other.

    Args:
        train_stage: trains a stage and yields the number of steps done, first 0.
    """
    return [_rehearse_stage(config, number, train_stage) for number in config.stages]


def _rehearse_stage(config: TokenizerTrainConfig, number: int, train_stage: TrainStage) -> Report:
    stage = config.stage_config(number)
    short = rehearsal(config, number)
    report = Report(
        name=f"tokenizer, stage {number}",
        samples="images",
        micro_batch_size=stage.micro_batch_size,
        global_batch_size=stage.global_batch_size,
        max_steps=stage.max_steps,
        zero=config.zero,
        checkpointing=config.activation_checkpointing,
        zeros=(0, 1, 2),
    )
    with scratch_folder(Path(config.output_dir)) as folder:
        run = open_run(folder / f"stage{number}", short, seed=config.seed)
        run.begin()

        def train(watch: Watch) -> None:
            set_seed(config.seed)
            for done in train_stage(short, number, random_model(short), run):
                watch.step() if done else watch.on_step_begin()

        return rehearse(train, report, config.dry_run)


def rehearsal(config: TokenizerTrainConfig, number: int) -> TokenizerTrainConfig:
    """The configuration of `dry_run` steps of a stage, each with all that takes time or memory."""
    stage = config.stage_config(number)
    short = dataclasses.replace(
        stage,
        max_steps=config.dry_run + 1,  # the last one is not taken: it would write the model
        global_batch_size=stage.micro_batch_size * world_size(),
        discriminator_start=0,
        bypass_steps=0,
        revival_interval=0,
    )
    stages: dict[str, Any] = {f"stage{number}": short}
    return dataclasses.replace(
        config,
        **stages,
        model=without_download(config.model),
        data=dataclasses.replace(config.data, train="scenes", validation=None, num_workers=0),
        micro_batch_size=None,
        random_perceptual_weights=True,
        log_steps=config.dry_run + 1,
        save_steps=config.dry_run + 1,
        sample_steps=config.dry_run + 1,
    )


def rehearse_checkpoints(config: TokenizerTrainConfig, train_stage: TrainStage) -> None:
    """Rehearse what follows the steps of each configured stage: log, previews, checkpoint, resume.

    Half-precision kernels that refuse a preview would otherwise show up hours into the run.
    """
    for number in config.stages:
        short = rehearsal(dataclasses.replace(config, dry_run=1), number)
        often = dataclasses.replace(short, log_steps=1, save_steps=1, sample_steps=1)
        with scratch_folder(Path(config.output_dir)) as folder:
            _rehearse_checkpoint(often, number, train_stage, folder / f"stage{number}")


def _rehearse_checkpoint(
    config: TokenizerTrainConfig,
    number: int,
    train_stage: TrainStage,
    folder: Path,
) -> None:
    run = open_run(folder, config, seed=config.seed)
    run.begin()
    model = random_model(config)
    before = features_at_taps(model, bf16=config.bf16)
    steps = train_stage(config, number, model, run)
    next(steps)
    begin = time.perf_counter()
    saved = next(steps)
    steps.close()
    after = features_at_taps(model, bf16=config.bf16)
    del steps, model
    gc.collect()  # the next model takes its place
    resumed = train_stage(config, number, random_model(config), run)
    assert next(resumed) == saved, "the resume starts after another step than the saved one"
    resumed.close()
    if is_main_process():
        files = (folder / f"step-{saved}").rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file()) / GIB
        seconds = time.perf_counter() - begin
        print(
            f"a step, its previews, a checkpoint of {size:.2f} GiB and a resume: {seconds:.1f} s\n"
            "features of scenes: root mean square, of the largest channel, distillation loss"
        )
        for tap in FEATURE_TAPS:
            squares = before[tap].square().mean((0, 1))
            loss = distillation_loss(after[tap], before[tap])
            chosen = "  (feature_tap of this run)" if tap == config.model.feature_tap else ""
            scale = f"{squares.mean().sqrt():10.3g}{squares.max().sqrt():10.3g}{loss:12.3g}"
            print(f"  {tap:22}{scale}{chosen}", flush=True)


@torch.no_grad()
def features_at_taps(model: VQRAEModel, *, bf16: bool) -> dict[str, Tensor]:
    """The features (B, N, D) of eight scenes at each tap, fp32 on the CPU."""
    scenes = open_images("scenes", image_size=model.config.image_size, split="validation")
    images = torch.stack([scenes[i]["image"] for i in range(8)]).to(model.device) / 255
    found = {}
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        for tap in FEATURE_TAPS:
            features = encoder_features(model.encoder, model.normalize(images), tap)
            found[tap] = features.float().cpu()
    return found


def random_model(config: TokenizerTrainConfig) -> VQRAEModel:
    """The tokenizer as it enters stage 1; its encoder is the pretrained one where that is here."""
    return first_model(config, attention_implementation(config.attention, half=config.bf16))


def without_download(model: ModelConfig) -> ModelConfig:
    """The same model with random weights, where its encoder is known but not on this machine."""
    if model.text_tokenizer is not None and not is_here(model.text_tokenizer):
        model = dataclasses.replace(model, text_tokenizer=None)  # the words of scenes
    if model.encoder is None or is_here(model.encoder):
        return model
    values = model.encoder_config or KNOWN_MODELS.get(model.encoder)
    if values is None:
        raise ValueError(
            f"encoder {model.encoder}: not on this machine: give model.encoder=FOLDER or "
            "model.encoder_config"
        )
    return dataclasses.replace(model, encoder=None, encoder_config=values)


def tokenizer_config(name: str) -> VQRAEConfig:
    """The configuration of a tokenizer on this machine, or of one that a shipped YAML would make.

    Raises:
        ValueError: when it is neither.
    """
    if is_here(name):
        return VQRAEConfig.from_pretrained(resolve_model(name))
    for stem in shipped_names("vqrae.tokenizer"):
        try:
            config = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", stem))
        except ConfigError:
            continue
        if config.output_dir == name:
            with torch.device("meta"):
                return build_tokenizer(without_download(config.model), "sdpa").config
    raise ValueError(
        f"tokenizer {name}: not on this machine, and no shipped configuration makes it: "
        "give tokenizer=FOLDER"
    )


def stand_in_tokenizer(name: str, folder: Path) -> str:
    """A tokenizer's folder, or one without its weights where it is not on this machine."""
    if Path(name).is_dir():
        return name
    config: PreTrainedConfig = tokenizer_config(name)
    return stand_in(folder, config)


def stand_in_llm(name: str, folder: Path, word: str) -> str:
    """A language model's folder, or one without its weights where it is not on this machine.

    Args:
        word: the only one that its text tokenizer knows, which the dry run's texts repeat.
    """
    if Path(name).is_dir():
        return name
    llm = stand_in(folder, known_config(name))
    build_word_tokenizer([word]).save_pretrained(llm)
    return llm
