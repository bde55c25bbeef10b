"""Train the unified model: one language model that generates, captions and answers (UniTok).

    python -m vqrae.mllm.train tiny tokenizer=RUN llm=FOLDER output_dir=RUN [key=value …]
    torchrun --nproc_per_node 8 -m vqrae.mllm.train unitok_mllm …

Images are encoded on the fly by the frozen tokenizer; code shards spare that. The loss is the mean
over all targets of a step, codes and text tokens, of all processes and micro-batches: neither their
number nor how samples fall into them changes it. (UniTok takes the mean of each micro-batch of each
process; with one of both it is the same.) The same command resumes, and does nothing once finished.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from vqrae.common.cli import parse
from vqrae.common.distributed import (
    attention_implementation,
    is_main_process,
    sum_over_processes,
)
from vqrae.common.dry_run import print_reports
from vqrae.common.errors import run_main
from vqrae.common.files import printable
from vqrae.common.trainer import (
    InstrumentCallback,
    WholeTrainer,
    build_optimizers,
    check_launch,
    run_trainer,
    save_model,
    training_arguments,
)
from vqrae.data.sources import fingerprint as data_fingerprint
from vqrae.data.sources import is_encoded, texts_of
from vqrae.data.word_tokenizer import describe_unknown
from vqrae.generation.data import TrainingStream, encode_images, fill_codes, load_frozen_tokenizer
from vqrae.generation.own_tokenizer import open_run, record_tokenizer
from vqrae.generation.preview import PreviewCallback
from vqrae.mllm.build import build_model, image_prompt
from vqrae.mllm.config import MLLMConfig
from vqrae.mllm.data import captions_of, open_tasks
from vqrae.mllm.dry_run import dry_run
from vqrae.mllm.inference import UnifiedGenerator
from vqrae.mllm.sequences import SequenceEncoder, UnifiedCollator


def train(config: MLLMConfig) -> Path:
    """Train or resume, and return the folder of the finished model."""
    # ---- run: begin, resume, find finished, or refuse other settings
    output, optimization = Path(config.output_dir), config.optimization
    run, tokenizer_folder, fingerprint = open_run(config, config.tokenizer)
    if run.finished(optimization.max_steps):
        return output / "model"
    check_launch(optimization, output)

    # ---- data: samples in order
    # The tokenizer before the arguments: under ZeRO-3 these decide how later models are built.
    tokenizer = load_frozen_tokenizer(tokenizer_folder)
    arguments = training_arguments(optimization, output, seed=config.seed)
    arguments.train_sampling_strategy = "sequential"
    samples = open_tasks(
        config, image_size=tokenizer.config.image_size, tokenizer_fingerprint=fingerprint
    )
    stream = TrainingStream(
        samples,
        length=optimization.max_steps * optimization.global_batch_size,
        caption_dropout=config.caption_dropout,
        seed=config.seed,
    )
    sources = {task.data: None for task in config.tasks.values() if task.weight}
    run.begin({"tokenizer": fingerprint, "data": "; ".join(map(data_fingerprint, sources))})
    texts: list[str] = []
    for part in samples.parts:
        texts += texts_of(part.samples)

    # ---- model
    set_seed(config.seed)  # the depth head's first weights
    attention = attention_implementation(config.attn_implementation, half=optimization.bf16)
    model, processor = build_model(config, tokenizer, texts, attention=attention)
    record_tokenizer(model.config, config.tokenizer, fingerprint, output / "model")
    prompt = image_prompt(model.config, processor.tokenizer)
    end_of_image = model.config.end_of_image
    encode = SequenceEncoder(processor, prompt, end_of_image, max_length=config.max_length)
    if is_main_process() and (unknown := describe_unknown(processor.tokenizer, texts)):
        print(printable(f"text: {unknown}"), flush=True)

    # ---- train, save
    if not all(is_encoded(part.samples) for part in samples.parts):
        tokenizer.to(arguments.device)
    count = 0 if optimization.zero == 3 else config.previews
    preview = PreviewCallback(
        run,
        processor.tokenizer,
        tokenizer_folder,
        captions=captions_of(samples, count),
        kind=UnifiedGenerator,
    )
    trainer = UnifiedTrainer(
        encode=functools.partial(encode_images, tokenizer),
        model=model,
        args=arguments,
        train_dataset=stream,
        data_collator=UnifiedCollator(encode, tokenizer.config.code_shape),
        optimizers=build_optimizers(optimization, model),
        callbacks=[InstrumentCallback(run, "mllm"), preview],
    )
    run_trainer(trainer)
    save_model(trainer, output / "model", processor.save_pretrained)
    return output / "model"


class UnifiedTrainer(WholeTrainer):
    """A `Trainer` whose loss is the mean over the targets of a step, and that logs its two parts.

    `UnifiedModel.forward` computes both: cross entropy of codes, by the depth head, and of text.

    Args:
        encode: images uint8 (Q, 3, H, W) -> codes.
    """

    def __init__(self, *, encode: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.encode = encode
        # Losses of codes and text, and their numbers, since the last log line.
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=self.args.device)

    def get_batch_samples(self, *args: Any) -> tuple[list, Tensor]:
        batches, _ = super().get_batch_samples(*args)
        count = sum(batch["num_targets"] for batch in batches)
        return batches, sum_over_processes(torch.as_tensor(count, device=self.args.device))

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        inputs = fill_codes(inputs, self.encode)
        options["return_outputs"] = True
        loss, outputs = super().compute_loss(model, inputs, *args, **options)
        codes = inputs["num_image_codes"]
        self.sums += torch.stack(
            [outputs.sums, torch.stack([codes, inputs["num_targets"] - codes])]
        )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            losses, counts = sum_over_processes(self.sums.clone()).tolist()
            for name, loss, count in zip(("image_loss", "text_loss"), losses, counts, strict=True):
                logs |= {name: loss / count} if count else {}
            self.sums.zero_()
        super().log(logs, *args, **options)


def main(argv: list[str] | None = None) -> None:
    """Command line: CONFIG [key.path=value …]."""
    config = parse(MLLMConfig, argv, package="vqrae.mllm")
    if config.dry_run:
        print_reports(dry_run(config, train))
    else:
        train(config)


if __name__ == "__main__":
    run_main(main)
