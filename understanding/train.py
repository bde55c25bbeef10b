"""Train LLaVA-1.5 on the tokenizer's features: `pretrain` fits the projector to captions, `sft` projector and LLM to dialogues.

    python -m vqrae.understanding.train tiny tokenizer=RUN llm=FOLDER output_dir=OUT [stage=pretrain|sft|both] [key=value …]
    torchrun --nproc_per_node 8 -m vqrae.understanding.train CONFIG.yaml …

The tokenizer's encoder stays frozen in both stages, as in VQRAE (arXiv 2511.23386, Table 8) and LLaVA-1.5 (arXiv
2310.03744). Each stage keeps its checkpoints and metrics in `OUT/<stage>/`; `OUT/pretrain/model` and, at the end,
`OUT/model` are plain `LlavaForConditionalGeneration` folders, also after LoRA, whose adapter stays in `OUT/sft/adapter`.
Pretrain leaves LLaVA's `mm_projector.bin` too. The same command resumes, and does nothing once finished.
"""

import dataclasses
import functools
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    set_seed,
)

from vqrae.common.checkpoints import load_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import attention_implementation, is_main_process
from vqrae.common.errors import require_package, run_main
from vqrae.common.files import atomic_path, printable
from vqrae.common.run import (
    RunDirectory,
    changed_settings,
    mark_trained,
    refuse_changes,
    remove_temporaries,
    trained_steps,
)
from vqrae.common.trainer import (
    InstrumentCallback,
    OptimizationConfig,
    build_optimizers,
    check_launch,
    free_engine,
    run_trainer,
    save_model,
    training_arguments,
)
from vqrae.data.sources import (
    Samples,
    fingerprint,
    holds_conversations,
    open_conversations,
    open_pairs,
    texts_of,
)
from vqrae.data.word_tokenizer import is_word_tokenizer
from vqrae.understanding.build import (
    FINGERPRINT_KEY,
    build_llava,
    for_pretraining,
    keep_released_names,
    require_tokenizer,
)
from vqrae.understanding.conversation import ConversationCollator, load_template
from vqrae.understanding.llava_trainer import LlavaTrainer
from vqrae.understanding.lora import LoraSettings, add_lora, merge_lora
from vqrae.understanding.packing import PackingCollator
from vqrae.understanding.projector import PROJECTOR_FILE, extract_projector, load_projector
from vqrae.understanding.quantized import QUANTIZED, read_quantized_features
from vqrae.understanding.words import add_word_rows, describe_unknown, learn_words

Stage = Literal["pretrain", "sft"]
STAGES: tuple[Stage, ...] = ("pretrain", "sft")
# What pretrain put into its model, which sft takes over.
BUILT_BY_PRETRAIN = {"llm", "chat_template", "aspect_ratio", "projector", "features"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One LLaVA run."""

    tokenizer: str
    """Run directory, folder or hub id of the visual tokenizer."""
    llm: str
    """Folder or hub id of the language model."""
    output_dir: str
    pretrain: OptimizationConfig
    sft: OptimizationConfig
    stage: Literal["pretrain", "sft", "both"] = "both"
    data: str = "scenes"
    """Conversations of sft: scenes, scenes:emoji, a .json file in LLaVA's format, hf:NAME, or a mixture of these."""
    pretrain_data: str | None = None
    """Captions of pretrain: scenes, a .jsonl, a .tar, or conversations as above; null means the same as `data`."""
    image_folder: str | None = None
    """Where the images of a .json file of `data` lie; null means beside it."""
    pretrain_image_folder: str | None = None
    """The same for `pretrain_data`."""
    skip_missing: int = 0
    """So many records of a .json file may lack their images (mix-665K: those of OCR-VQA); they are left out."""
    chat_template: Literal["chatml", "vicuna_v1"] = "chatml"
    """What the LLM speaks; it is stored in the model folder."""
    aspect_ratio: Literal["crop", "pad"] = "crop"
    """What becomes of images that are not square: the centre is cut out, or LLaVA-1.5's border in the mean colour is added.
    It is stored in the model folder. Pretrain cuts out the centre, as LLaVA-1.5's does."""
    max_length: int = 2048
    """Tokens of a sample, image tokens included."""
    batching: Literal["random", "grouped", "packed"] = "random"
    """Samples of one sft step: drawn at random; LLaVA's, of one modality and balanced in length; or at random and laid into
    rows without padding, which is fastest and has the loss of random."""
    projector: str | None = None
    """LLaVA's mm_projector.bin to start from instead of a random projector."""
    lora: LoraSettings | None = None
    """Train adapters in sft instead of the whole language model; {} takes LLaVA's settings."""
    attn_implementation: str = "auto"
    features: Literal["continuous", "quantized"] = "continuous"
    """What the projector reads; `quantized` is for comparison only (see `vqrae.understanding.quantized`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "max_length", low=1)


def freeze(model: LlavaForConditionalGeneration, stage: Stage) -> None:
    """Leave trainable: the projector, and in sft the language model as well. The tower never."""
    model.requires_grad_(False)
    trained: list[nn.Module] = [model.model.multi_modal_projector]
    if stage == "sft":
        trained += [model.model.language_model, model.lm_head]
    for module in trained:
        module.requires_grad_(True)


def open_data(config: TrainConfig, stage: Stage, image_size: int) -> Samples:
    """The samples of a stage: caption pairs for pretrain (unless they come as conversations), records for sft."""
    source = data_source(config, stage)
    if stage == "pretrain" and not holds_conversations(source):
        return open_pairs(source, image_size=image_size, detailed=True, seed=config.seed)
    own = stage == "pretrain" and config.pretrain_data
    folder = config.pretrain_image_folder if own else config.image_folder
    options: dict[str, Any] = {
        "image_folder": folder,
        "skip_missing": config.skip_missing,
        "seed": config.seed,
    }
    return open_conversations(source, image_size=image_size, **options)


def data_source(config: TrainConfig, stage: Stage) -> str:
    """Name of the source that a stage reads."""
    return config.pretrain_data or config.data if stage == "pretrain" else config.data


def load_or_build(
    config: TrainConfig, stage: Stage
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model a stage starts from: for sft the pretrained one when there is any, else LLM and tokenizer put together.

    Every process holds a full copy in host memory until DeepSpeed has partitioned it.
    """
    optimization = getattr(config, stage)
    attention = attention_implementation(config.attn_implementation, half=optimization.bf16)
    # Without DeepSpeed's master weights the optimizer works on the weights themselves: those must be float32. Under LoRA
    # they are frozen.
    frozen = stage == "sft" and config.lora is not None
    dtype = torch.bfloat16 if optimization.bf16 and (optimization.zero or frozen) else torch.float32
    pretrained = final_model(config, "pretrain")
    if stage == "sft" and (pretrained / "config.json").is_file():
        model = load_model(
            LlavaForConditionalGeneration, pretrained, dtype=dtype, attn_implementation=attention
        )
        require_tokenizer(model.config, config.tokenizer, pretrained)
        keep_released_names(model)
        return with_words_of_data(config, model, AutoProcessor.from_pretrained(pretrained))
    if stage == "sft" and is_main_process():
        print(
            f"{pretrained} does not exist: the projector starts at random (stage=both pretrains it first)",
            flush=True,
        )
    model, processor = build_llava(
        config.tokenizer,
        config.llm,
        attention,
        chat_template=config.chat_template,
        aspect_ratio=config.aspect_ratio,
        dtype=dtype,
    )
    if config.projector:
        load_projector(model.model.multi_modal_projector, config.projector)
    return with_words_of_data(config, model, processor)


def with_words_of_data(
    config: TrainConfig, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor that know the words of the data of both stages, where the vocabulary is a small one of words."""
    first = len(processor.tokenizer)
    if words := learn_words_of_data(config, processor.tokenizer):
        add_word_rows(model, first, first + len(words))
        if is_main_process():
            shown = ", ".join(words[:8])
            print(
                printable(
                    f"text: {len(words):,} words of the data are new to the language model: {shown}"
                ),
                flush=True,
            )
    return model, processor


def learn_words_of_data(config: TrainConfig, text_tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words of the data of both stages that a word tokenizer has now got ids for, see `learn_words`."""
    if not is_word_tokenizer(text_tokenizer):
        return []
    sources = {data_source(config, stage): stage for stage in reversed(STAGES)}
    return learn_words(
        text_tokenizer,
        [t for stage in sources.values() for t in texts_of(open_data(config, stage, image_size=8))],
    )


def build_collator(
    config: TrainConfig, stage: Stage, processor: LlavaProcessor
) -> ConversationCollator:
    """What makes the batches of a stage."""
    template = processor.chat_template
    if stage == "pretrain":
        template, processor = (
            load_template("plain", processor.tokenizer),
            for_pretraining(processor),
        )
    options: dict[str, Any] = {"max_length": config.max_length, "chat_template": template}
    if stage == "sft" and config.batching == "packed":
        one_row = (
            attention_implementation(config.attn_implementation, half=config.sft.bf16)
            == "flash_attention_2"
        )
        return PackingCollator(processor, one_row=one_row, **options)
    return ConversationCollator(processor, **options)


def open_run(config: TrainConfig, stage: Stage) -> RunDirectory:
    """The folder of a stage.

    Raises:
        ValueError: when it holds results of other settings, or when sft would start from a model that pretrain built with
            others.
    """
    names = {field.name for field in dataclasses.fields(config)}
    folder = Path(config.output_dir)
    if stage == "pretrain":
        own_data = {"data", "image_folder"} if config.pretrain_data else set()
        return RunDirectory(
            folder / stage, config, seed=config.seed, ignore={"sft", "lora", "batching"} | own_data
        )
    if final_model(config, "pretrain").is_dir() and is_main_process():
        refuse_changes(
            folder / "pretrain",
            changed_settings(folder / "pretrain", config, names - BUILT_BY_PRETRAIN),
        )
    if is_main_process():
        remove_temporaries(folder)
    ignore = {"pretrain", "pretrain_data", "pretrain_image_folder"}
    return RunDirectory(folder / stage, config, seed=config.seed, ignore=ignore)


def final_model(config: TrainConfig, stage: Stage) -> Path:
    """Where a stage leaves its model."""
    output_dir = Path(config.output_dir)
    return output_dir / "model" if stage == "sft" else output_dir / stage / "model"


def run_stage(config: TrainConfig, stage: Stage) -> None:
    """Train one stage to its end, or return at once when that was done before."""
    run_dir, final = Path(config.output_dir) / stage, final_model(config, stage)
    optimization: OptimizationConfig = getattr(config, stage)
    if (final / "config.json").is_file():
        require_tokenizer(LlavaConfig.from_pretrained(final), config.tokenizer, final)
    run = open_run(config, stage)
    if trained_steps(final) >= optimization.max_steps:
        print(f"{stage}: {final} is finished ({optimization.max_steps} steps)", flush=True)
        return
    set_seed(config.seed)  # the projector's first weights
    model, processor = load_or_build(config, stage)
    lora = config.lora if stage == "sft" else None
    trained: nn.Module = model
    if lora:
        trained = add_lora(model, lora)
        optimization = dataclasses.replace(optimization, learning_rate=lora.learning_rate)
    else:
        freeze(model, stage)
    if config.features == QUANTIZED:
        read_quantized_features(model, config.tokenizer)
    dataset = open_data(config, stage, model.config.vision_config.image_size)
    identities = {
        "tokenizer": getattr(model.config, FINGERPRINT_KEY),
        "data": fingerprint(data_source(config, stage)),
    }
    if stage == "sft":
        identities["pretrain"] = f"{trained_steps(final_model(config, 'pretrain'))} steps"
    run.begin(identities)
    print_parameters(trained)
    if is_main_process():
        epochs = optimization.max_steps * optimization.global_batch_size / len(dataset)
        print(
            f"data: {len(dataset):,} samples, {epochs:.2f} epochs in {optimization.max_steps:,} steps",
            flush=True,
        )
        if unknown := describe_unknown(processor.tokenizer, texts_of(dataset)):
            print(printable(f"text: {unknown}"), flush=True)
    trainer = LlavaTrainer(
        model=trained,
        args=training_arguments(optimization, run_dir, seed=config.seed),
        train_dataset=dataset,
        data_collator=build_collator(config, stage, processor),
        processing_class=processor,
        optimizers=build_optimizers(optimization, trained),
        callbacks=[InstrumentCallback(run, stage)],
        projector_only=stage == "pretrain",
        grouped=stage == "sft" and config.batching == "grouped",
        projector_learning_rate=lora.projector_learning_rate if lora else None,
    )
    run_trainer(trainer)
    keep_projector = (
        functools.partial(extract_projector, path=run_dir / PROJECTOR_FILE)
        if stage == "pretrain"
        else None
    )
    save_model(trainer, run_dir / "adapter" if lora else final, keep_projector)
    free_engine(trainer)
    if lora and is_main_process():
        save_merged(config, run_dir / "adapter", final, steps=trainer.state.global_step)
    trainer.accelerator.wait_for_everyone()


def save_merged(config: TrainConfig, adapter: Path, folder: Path, *, steps: int) -> None:
    """Write the model with the adapter in its weights, as a folder that needs no peft and was trained for so many steps."""
    base, processor = load_or_build(config, "sft")
    model = merge_lora(base, adapter)
    model.config.use_cache = True
    with atomic_path(folder) as whole:
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
        mark_trained(whole, steps)


def print_parameters(model: nn.Module) -> None:
    """Say how much is trained."""
    if is_main_process():
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained = sum(n for n, trainable in sizes if trainable)
        print(f"parameters: {sum(n for n, _ in sizes):,}, trained {trained:,}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line: CONFIG [key.path=value …]."""
    config = parse(TrainConfig, argv, package="vqrae.understanding")
    if config.lora is not None:
        require_package("peft", "lora")
    stages: tuple[Stage, ...] = STAGES if config.stage == "both" else (config.stage,)
    for stage in stages:
        optimization: OptimizationConfig = getattr(config, stage)
        if trained_steps(final_model(config, stage)) < optimization.max_steps:
            check_launch(optimization, Path(config.output_dir) / stage)
    for stage in stages:
        run_stage(config, stage)
        gc.collect()  # a model of billions of weights waits in cycles


if __name__ == "__main__":
    run_main(main)
