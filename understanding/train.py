"""Train LLaVA-1.5 on the tokenizer's features: `pretrain` fits the projector to captions, `sft`
projector and language model to dialogues.

    python -m vqrae.understanding.train tiny tokenizer=RUN llm=FOLDER output_dir=OUT [key=value …]
    torchrun --nproc_per_node 8 -m vqrae.understanding.train CONFIG.yaml …

The tokenizer's encoder stays frozen in both stages, as in VQRAE (arXiv 2511.23386, Table 8) and
LLaVA-1.5 (arXiv 2310.03744). Each stage keeps its checkpoints and metrics in `OUT/<stage>/`;
`OUT/pretrain/model` and, at the end, `OUT/model` are plain `LlavaForConditionalGeneration` folders,
also after LoRA, whose adapter stays in `OUT/sft/adapter`. Pretrain also leaves LLaVA's
`mm_projector.bin`. The same command resumes, and does nothing once finished.
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

from vqrae.common import run as runs
from vqrae.common.checkpoints import load_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import attention_implementation, is_main_process
from vqrae.common.dry_run import print_reports
from vqrae.common.errors import require_package, run_main
from vqrae.common.files import atomic_path, printable, remove_leftovers
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
from vqrae.data.word_tokenizer import describe_unknown, grow_word_tokenizer, is_word_tokenizer
from vqrae.understanding.build import (
    FINGERPRINT_KEY,
    Color,
    add_word_rows,
    build_llava,
    for_pretraining,
    keep_released_names,
    require_tokenizer,
)
from vqrae.understanding.conversation import ConversationCollator, load_template
from vqrae.understanding.dry_run import dry_run
from vqrae.understanding.packing import PackingCollator, SeparateCollator
from vqrae.understanding.projector import PROJECTOR_FILE, extract_projector, load_projector
from vqrae.understanding.trainer import LlavaTrainer, LoraSettings, add_lora, merge_lora
from vqrae.understanding.vision_tower import Features

Stage = Literal["pretrain", "sft"]
STAGES: tuple[Stage, ...] = ("pretrain", "sft")
MODEL_FOLDERS = {"pretrain": "pretrain/model", "sft": "model"}
# Settings of pretrain's model, which sft continues.
BUILT_BY_PRETRAIN = {
    "llm",
    "features",
    "chat_template",
    "aspect_ratio",
    "border_color",
    "projector",
}
NEW_WORDS = 8192  # a small vocabulary grows by at most the most frequent ones


@dataclass(frozen=True, kw_only=True)
class TrainConfig(runs.RunConfig):
    """One LLaVA run."""

    tokenizer: str
    """Run directory, folder or hub id of the visual tokenizer."""
    llm: str
    """Folder or hub id of the language model."""
    pretrain: OptimizationConfig
    sft: OptimizationConfig
    stage: Literal["pretrain", "sft", "both"] = "both"
    data: str = "scenes"
    """Conversations of sft: scenes, scenes:emoji, a .json file in LLaVA's format, or a
    mixture of these."""
    pretrain_data: str | None = None
    """Captions of pretrain: scenes, a .jsonl, a .tar, or conversations; null means `data`."""
    image_folder: str | None = None
    """Where the images of a .json file of `data` are; null means next to it."""
    pretrain_image_folder: str | None = None
    """The same for `pretrain_data`."""
    skip_missing: int = 0
    """Records of a .json file that may lack their images and are then left out (mix-665K: those of
    OCR-VQA)."""
    features: Features = "continuous"
    """What the projector reads: the encoder's features (VQRAE), or the quantized ones that the
    tokenizer's decoder reads (UniTok)."""
    chat_template: Literal["chatml", "vicuna_v1"] = "chatml"
    """Format of the LLM; stored in the model folder."""
    aspect_ratio: Literal["crop", "pad"] = "crop"
    """Images that are not square: cut out the centre, or add LLaVA-1.5's border in the mean colour.
    Stored in the model folder. Pretrain cuts out the centre, as LLaVA-1.5's does."""
    border_color: Color | None = None
    """Another colour of that border, for quantized features (UniTok: [122, 116, 104])."""
    max_length: int = 2048
    """Tokens of a sample, image tokens included."""
    batching: Literal["random", "grouped", "packed", "separate"] = "random"
    """Samples of one sft step: at random; of one modality and balanced in length, as in LLaVA; at
    random in rows without padding, which is fastest and has the loss of random; or such rows in
    which the questions of a dialogue do not see each other."""
    projector: str | None = None
    """LLaVA's mm_projector.bin to start from instead of a random projector."""
    lora: LoraSettings | None = None
    """Train adapters in sft instead of the whole language model; {} takes LLaVA's settings."""
    attn_implementation: str = "auto"
    dry_run: int = 0
    """Take this many steps of the longest dialogues, keep nothing, and report what they took."""

    def __post_init__(self) -> None:
        check_range(self, "max_length", low=1)
        check_range(self, "dry_run", low=0)

    def attention(self, *, half: bool) -> str:
        """The attention of tower and language model.

        Raises:
            ValueError: for flash-attention with separate questions, whose mask it does not take.
        """
        attention = attention_implementation(self.attn_implementation, half=half)
        if self.batching != "separate" or not attention.startswith("flash_attention"):
            return attention
        if self.attn_implementation == "auto":
            return "sdpa"
        raise ValueError(
            f"got attn_implementation={attention} with batching=separate, expected sdpa or eager: "
            "set attn_implementation=sdpa, or batching=packed"
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages to run, in order."""
        return STAGES if self.stage == "both" else (self.stage,)

    @property
    def reading(self) -> dict[str, Any]:
        """How images and text are read, as arguments of `build_llava` and `load_processor`."""
        names = ("features", "chat_template", "aspect_ratio", "border_color")
        return {name: getattr(self, name) for name in names}


def run_stage(config: TrainConfig, stage: Stage) -> None:
    """Train one stage to its end, or return at once when that was done before."""
    output = Path(config.output_dir)
    final, pretrained = output / MODEL_FOLDERS[stage], output / MODEL_FOLDERS["pretrain"]
    optimization: OptimizationConfig = getattr(config, stage)
    lora = config.lora if stage == "sft" else None

    # ---- run: begin, resume, find finished, or refuse other settings
    if (final / "config.json").is_file():
        require_tokenizer(LlavaConfig.from_pretrained(final), config.tokenizer, final)
    if stage == "pretrain":
        unread = {"sft", "lora", "batching"}
        if config.pretrain_data:
            unread |= {"data", "image_folder"}
    else:
        unread = {"pretrain", "pretrain_data", "pretrain_image_folder"}
        if is_main_process():
            remove_leftovers(output, exclusive=True)
            if pretrained.is_dir():
                others = {f.name for f in dataclasses.fields(config)} - BUILT_BY_PRETRAIN
                folder = pretrained.parent
                runs.refuse_changes(folder, runs.changed_settings(folder, config, others))
    options: dict[str, Any] = {"ignore": unread, "report_to": config.report_to}
    run = runs.open(output / stage, config, seed=config.seed, **options)
    if run.finished(optimization.max_steps, final.absolute()):
        return

    # ---- model: projector in pretrain; projector and language model, or adapters, in sft
    set_seed(config.seed)  # the projector's first weights
    model, processor = load_or_build(config, stage)
    trained: nn.Module = model
    if lora:
        trained = add_lora(model, lora)
        optimization = dataclasses.replace(optimization, learning_rate=lora.learning_rate)
    else:
        freeze(model, stage)

    # ---- data
    dataset = open_data(config, stage, model.config.vision_config.image_size)
    identities = {
        "tokenizer": getattr(model.config, FINGERPRINT_KEY),
        "data": fingerprint(data_source(config, stage)),
    }
    if stage == "sft":
        identities["pretrain"] = f"{runs.trained_steps(pretrained)} steps"
    run.begin(identities)
    print_parameters(trained)
    if is_main_process():
        steps, batch_size = optimization.max_steps, optimization.global_batch_size
        epochs = f"{steps * batch_size / len(dataset):.2f} epochs in {steps:,} steps"
        print(f"data: {len(dataset):,} samples, {epochs}", flush=True)
        if unknown := describe_unknown(processor.tokenizer, texts_of(dataset)):
            print(printable(f"text: {unknown}"), flush=True)

    # ---- trainer: the loss is LlavaForConditionalGeneration's own, the mean cross entropy of the
    # labels that are not IGNORE_INDEX, which the collator sets: answers alone
    trainer = LlavaTrainer(
        model=trained,
        args=training_arguments(optimization, run.path, seed=config.seed),
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

    # ---- save
    if stage == "pretrain":
        write_projector = functools.partial(extract_projector, path=run.path / PROJECTOR_FILE)
        save_model(trainer, final, write_projector)
    else:
        save_model(trainer, run.path / "adapter" if lora else final)
    free_engine(trainer)
    if lora and is_main_process():
        base, processor = load_or_build(config, "sft")
        merged = merge_lora(base, run.path / "adapter")
        merged.config.use_cache = True
        with atomic_path(final) as whole:
            merged.save_pretrained(whole)
            processor.save_pretrained(whole)
            runs.mark_trained(whole, trainer.state.global_step)
    trainer.accelerator.wait_for_everyone()


def load_or_build(
    config: TrainConfig, stage: Stage
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """What a stage starts from: LLM and tokenizer put together; for sft what pretrain left, if any.

    Every process holds a full copy in host memory until DeepSpeed has partitioned it.
    """
    optimization = getattr(config, stage)
    attention = config.attention(half=optimization.bf16)
    # Without DeepSpeed's master weights the optimizer works on the weights themselves, which must
    # be float32. Under LoRA they are frozen.
    frozen = stage == "sft" and config.lora is not None
    dtype = torch.bfloat16 if optimization.bf16 and (optimization.zero or frozen) else torch.float32
    pretrained = Path(config.output_dir) / MODEL_FOLDERS["pretrain"]
    if stage == "sft" and (pretrained / "config.json").is_file():
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        model = load_model(LlavaForConditionalGeneration, pretrained, **options)
        processor = AutoProcessor.from_pretrained(pretrained)
        require_tokenizer(model.config, config.tokenizer, pretrained)
        keep_released_names(model)
    else:
        if stage == "sft" and is_main_process():
            start = "the projector starts at random (stage=both pretrains it first)"
            print(f"{pretrained} does not exist: {start}", flush=True)
        model, processor = build_llava(
            config.tokenizer,
            config.llm,
            attention,
            dtype=dtype,
            **config.reading,
        )
        if config.projector:
            load_projector(model.model.multi_modal_projector, config.projector)
    first = len(processor.tokenizer)
    if words := learn_words(config, processor.tokenizer):
        add_word_rows(model, first, first + len(words))
        if is_main_process():
            shown = f"{len(words):,} words of the data are new to the language model"
            print(printable(f"text: {shown}: {', '.join(words[:8])}"), flush=True)
    return model, processor


def learn_words(config: TrainConfig, text_tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words of the data of both stages that a word tokenizer now gets ids for.

    A released language model reads any text. Those of the embedded default know the words of
    scenes.
    """
    if not is_word_tokenizer(text_tokenizer):
        return []
    texts: list[str] = []
    # Ids follow from the texts and their order; one source is read once.
    for stage in {data_source(config, stage): stage for stage in reversed(STAGES)}.values():
        texts += texts_of(open_data(config, stage, image_size=8))
    return grow_word_tokenizer(text_tokenizer, texts, limit=NEW_WORDS)


def freeze(model: LlavaForConditionalGeneration, stage: Stage) -> None:
    """Leave trainable: the projector, and in sft the language model as well. The tower never."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if stage == "sft":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)


def data_source(config: TrainConfig, stage: Stage) -> str:
    """Name of the source that a stage reads."""
    return config.pretrain_data or config.data if stage == "pretrain" else config.data


def open_data(config: TrainConfig, stage: Stage, image_size: int) -> Samples:
    """Samples of a stage: records, or caption pairs for pretrain unless they are conversations."""
    source = data_source(config, stage)
    if stage == "pretrain" and not holds_conversations(source):
        return open_pairs(source, image_size=image_size, detailed=True, seed=config.seed)
    own = stage == "pretrain" and config.pretrain_data
    return open_conversations(
        source,
        image_size=image_size,
        image_folder=config.pretrain_image_folder if own else config.image_folder,
        skip_missing=config.skip_missing,
        seed=config.seed,
    )


def build_collator(
    config: TrainConfig, stage: Stage, processor: LlavaProcessor
) -> ConversationCollator:
    """What makes the batches of a stage."""
    options: dict[str, Any] = {"max_length": config.max_length}
    if stage == "pretrain":
        template = load_template("plain", processor.tokenizer)
        return ConversationCollator(for_pretraining(processor), chat_template=template, **options)
    if config.batching == "packed":
        one_row = config.attention(half=config.sft.bf16) == "flash_attention_2"
        return PackingCollator(processor, one_row=one_row, **options)
    if config.batching == "separate":
        return SeparateCollator(processor, **options)
    return ConversationCollator(processor, **options)


def print_parameters(model: nn.Module) -> None:
    """Print how much of a model is trained."""
    if is_main_process():
        parameters = list(model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        print(f"parameters: {total:,}, trained {trained:,}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line: CONFIG [key.path=value …]."""
    config = parse(TrainConfig, argv, package="vqrae.understanding")
    if config.lora is not None:
        require_package("peft", "lora")
    if config.dry_run:
        print_reports(dry_run(config, run_stage))
        return
    output = Path(config.output_dir)
    # All launches are checked before the first stage trains for days.
    for stage in config.stages:
        optimization: OptimizationConfig = getattr(config, stage)
        if runs.trained_steps(output / MODEL_FOLDERS[stage]) < optimization.max_steps:
            check_launch(optimization, output / stage)
    for stage in config.stages:
        run_stage(config, stage)
        gc.collect()  # a model of billions of weights waits in cycles


if __name__ == "__main__":
    run_main(main)
