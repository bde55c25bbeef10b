"""Train the generator: next-token prediction on codes (VQRAE, arXiv 2511.23386, section 3.5).

    python -m vqrae.generation.train tiny tokenizer=RUN data=CODES output_dir=RUN [key=value ...]
    python -m vqrae.generation.train tiny tokenizer=RUN data='DIR/*.tar' output_dir=RUN
    python -m vqrae.generation.train qwen3_0_6b dry_run=1

Images are encoded on the fly by the frozen tokenizer; code shards spare that. The same command
resumes an interrupted run and returns at once from a finished one.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vqrae.common.checkpoints import resolve_model
from vqrae.common.cli import parse
from vqrae.common.distributed import attention_implementation
from vqrae.common.dry_run import print_reports
from vqrae.common.errors import run_main
from vqrae.common.trainer import (
    InstrumentCallback,
    WholeTrainer,
    build_optimizers,
    check_launch,
    run_trainer,
    save_model,
    training_arguments,
)
from vqrae.data.sources import Samples, classes_of, is_encoded, open_pairs, texts_of
from vqrae.data.sources import fingerprint as data_fingerprint
from vqrae.data.sources import vocabulary as words_of
from vqrae.data.word_tokenizer import fit_word_tokenizer
from vqrae.generation.config import GeneratorConfig, GeneratorModelConfig, TrainingConfig
from vqrae.generation.data import (
    GenerationCollator,
    TrainingStream,
    encode_images,
    fill_codes,
    load_frozen_tokenizer,
)
from vqrae.generation.dry_run import dry_run
from vqrae.generation.heads import SingleCodeHead
from vqrae.generation.modeling import (
    ClassEncoder,
    PromptEncoder,
    Prompts,
    VisualVocabulary,
    build_generator,
    start_from_codebook,
)
from vqrae.generation.multi_code import build_multi_code
from vqrae.generation.own_tokenizer import open_run, record_tokenizer
from vqrae.generation.preview import PreviewCallback
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel


def main(argv: list[str] | None = None) -> None:
    config = parse(GeneratorConfig, argv, package="vqrae.generation", section="training")
    if config.dry_run:
        print_reports(dry_run(config, train))
    else:
        train(config)


def train(config: TrainingConfig) -> Path:
    """Train or resume, and return the folder of the finished generator."""
    # ---- run: begin, resume, find finished, or refuse other settings
    output, optimization = Path(config.output_dir), config.optimization
    run, tokenizer_folder, fingerprint = open_run(config, config.tokenizer)
    if run.finished(optimization.max_steps):
        return output / "model"
    check_launch(optimization, output)

    # ---- data: samples in order, prompts
    visual = VQRAEConfig.from_pretrained(tokenizer_folder)
    samples = open_pairs(
        config.data,
        image_size=visual.image_size,
        tokenizer_fingerprint=fingerprint,
        seed=config.seed,
    )
    stream = TrainingStream(
        samples,
        length=optimization.max_steps * optimization.global_batch_size,
        caption_dropout=config.model.caption_dropout,
        seed=config.seed,
    )
    encode_prompt, save_prompts = build_prompts(config, samples, visual)
    vocabulary = encode_prompt.vocabulary

    # ---- models
    # The tokenizer before the arguments: under ZeRO-3 these decide how later models are built.
    tokenizer = load_frozen_tokenizer(tokenizer_folder)
    arguments = training_arguments(optimization, output, seed=config.seed)
    arguments.train_sampling_strategy = "sequential"
    run.begin({"tokenizer": fingerprint, "data": data_fingerprint(config.data)})
    torch.manual_seed(config.seed)
    model, model_loss = build_model(config, vocabulary, tokenizer)
    # What sampling needs to know.
    for name, value in encode_prompt.values().items():
        setattr(model.config, name, value)
    model.config.caption_dropout = config.model.caption_dropout
    model.config.sampling = dataclasses.asdict(config.model.sampling)
    record_tokenizer(model.config, config.tokenizer, fingerprint, output / "model")

    # ---- loss
    encode = None
    if not is_encoded(samples):
        encode = functools.partial(encode_images, tokenizer.to(arguments.device))
    del tokenizer  # training on shards keeps nothing of it

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model_loss(model, batch if encode is None else fill_codes(batch, encode))

    # ---- train, save
    count = 0 if optimization.zero == 3 else config.previews
    preview = PreviewCallback(
        run,
        getattr(encode_prompt, "text_tokenizer", None),
        tokenizer_folder,
        captions=[samples[i]["caption"] for i in range(min(count, len(samples)))],
    )
    trainer = GeneratorTrainer(
        loss=loss,
        model=model,
        args=arguments,
        train_dataset=stream,
        data_collator=GenerationCollator(encode_prompt),
        optimizers=build_optimizers(optimization, model),
        callbacks=[InstrumentCallback(run, "generator"), preview],
    )
    run_trainer(trainer)
    save_model(trainer, output / "model", save_prompts)
    return output / "model"


def build_prompts(
    config: TrainingConfig, samples: Samples, visual: VQRAEConfig
) -> tuple[Prompts, Callable[[Path], Any] | None]:
    """How captions become ids, and what writes the text tokenizer to a model's folder."""
    model = config.model
    sizes = {
        "codebook_size": visual.codebook_size,
        "num_codes": visual.grid_size**2,
        "num_codebooks": visual.num_codebooks,
    }
    if model.condition == "class":
        classes = classes_of(samples)
        vocabulary = VisualVocabulary(offset=len(classes) + 1, num_classes=len(classes), **sizes)
        return ClassEncoder(classes, vocabulary), None
    if model.llm is not None:
        text_tokenizer = AutoTokenizer.from_pretrained(resolve_model(model.llm))
    else:
        text_tokenizer = fit_word_tokenizer(
            words_of(config.data), texts_of(samples), size=model.offset
        )
    vocabulary = VisualVocabulary(offset=model.offset, **sizes)
    return fit_prompts(model, text_tokenizer, vocabulary), text_tokenizer.save_pretrained


Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""(model, batch of `GenerationCollator` without images) -> scalar."""


def build_model(
    config: TrainingConfig, vocabulary: VisualVocabulary, tokenizer: VQRAEModel
) -> tuple[PreTrainedModel, Loss]:
    """The generator and its loss: for one code a position a plain Qwen3.

    Raises:
        ValueError: for an option that the other kind has.
    """
    options: dict[str, Any] = {
        "llm": config.model.llm,
        "llm_config": config.model.llm_config if config.model.llm is None else None,
        "attention": attention_implementation(
            config.model.attention, half=config.optimization.bf16
        ),
    }
    full_vocabulary = config.full_vocabulary_loss
    if vocabulary.num_codebooks > 1:
        if full_vocabulary:
            raise ValueError(
                f"got full_vocabulary_loss with {vocabulary.num_codebooks} codes a position, which "
                "have no ids: set full_vocabulary_loss=false"
            )
        options |= {"embedding": config.model.code_embedding, "dropout": config.model.dropout}
        options["head"] = dataclasses.asdict(config.model.depth)
        if config.model.positions == "grid":
            options["grid_size"] = tokenizer.config.grid_size
        return build_multi_code(vocabulary, tokenizer, **options), multi_code_loss
    if config.model.dropout or config.model.positions == "grid":
        raise ValueError(
            "got dropout or positions=grid with one code a position, which is a plain Qwen3: set "
            "dropout=0 and positions=sequence"
        )
    model = build_generator(vocabulary, **options)
    if config.model.embedding_init == "codebook":
        start_from_codebook(model, vocabulary, tokenizer.code_vectors())
    if not full_vocabulary:
        model.lm_head = SingleCodeHead(model.lm_head, vocabulary.code_rows)
    return model, functools.partial(
        visual_loss, vocabulary=vocabulary, full_vocabulary=full_vocabulary
    )


def multi_code_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a `MultiCodeModel`."""
    return model(**batch).loss


def visual_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    vocabulary: VisualVocabulary,
    *,
    full_vocabulary: bool = False,
) -> Tensor:
    """Mean cross entropy of the codes of a batch, one a position.

    Args:
        full_vocabulary: softmax over all rows of the head. Else over the codes alone, and
            `model.lm_head` is a `SingleCodeHead`.
    """
    inputs = dict(batch)
    codes = inputs.pop("codes")
    ids = vocabulary.to_ids(codes)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    # The sequence ends in the N codes: the N positions before its last one predict them, and no
    # other logits are computed.
    keep = vocabulary.num_codes + 1
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[:, :-1]
    targets = ids if full_vocabulary else codes
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class GeneratorTrainer(WholeTrainer):
    """A `Trainer` that minimises `loss(model, batch)`."""

    def __init__(self, *, loss: Loss, **options: Any) -> None:
        super().__init__(**options)
        self.loss = loss
        # Every sample has N codes: the mean over micro-batches is the mean over tokens.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return self.loss(model, inputs)


def fit_prompts(
    config: GeneratorModelConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    vocabulary: VisualVocabulary,
) -> PromptEncoder:
    """The prompt encoder whose longest prompt and the codes take at most `max_length` ids.

    Raises:
        ValueError: when that leaves no room for a caption.
    """
    encode = PromptEncoder(
        text_tokenizer,
        vocabulary,
        template=config.prompt_template,
        max_caption_tokens=config.max_caption_tokens,
    )
    room = config.max_length - vocabulary.num_codes - encode.template_length
    if room < 1:
        raise ValueError(
            f"got max_length {config.max_length}, expected more than {vocabulary.num_codes} codes "
            f"and the {encode.template_length} ids of the template: set a larger model.max_length"
        )
    encode.max_caption_tokens = min(encode.max_caption_tokens, room)
    return encode


if __name__ == "__main__":
    run_main(main)
