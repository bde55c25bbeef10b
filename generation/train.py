"""Train the generator: next-token prediction on the tokenizer's codes (VQRAE, arXiv 2511.23386, section 3.5).

    python -m vqrae.generation.train tiny tokenizer=RUN data=CODES output_dir=RUN [optimization.max_steps=N ...]
    python -m vqrae.generation.train tiny tokenizer=RUN data='DIR/*.tar' output_dir=RUN
    python -m vqrae.generation.train qwen3_0_6b dry_run=1

The loss is on codes only. Images are encoded on the fly by the frozen tokenizer; code shards spare that. The same command
resumes an interrupted run and returns at once from a finished one.
"""

import dataclasses
import functools
from pathlib import Path

import torch

from vqrae.common.checkpoints import local_model
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, require_same_tokenizer, weights_fingerprint
from vqrae.common.run import RunDirectory, trained_steps
from vqrae.common.trainer import (
    InstrumentCallback,
    check_launch,
    checkpoints,
    run_trainer,
    save_model,
    training_arguments,
)
from vqrae.data.sources import fingerprint as data_fingerprint
from vqrae.data.sources import is_encoded, open_pairs_or_codes, texts_of
from vqrae.generation.config import TrainingConfig, read_config
from vqrae.generation.data import TrainingStream
from vqrae.generation.dry_run import dry_run
from vqrae.generation.encoding import encode_images, load_encoder
from vqrae.generation.modeling import portable_path, start_from_codebook
from vqrae.generation.trainer import build_model, build_text_tokenizer, build_trainer, fit_prompts
from vqrae.generation.vocabulary import VisualVocabulary
from vqrae.tokenizer.configuration import VQRAEConfig


def _require_tokenizer(run: Path, fingerprint: str) -> None:
    """Refuse to go on with a generator that speaks the codes of another tokenizer.

    Raises:
        ValueError: naming the model or checkpoint.
    """
    for folder in (run / "model", *checkpoints(run)):
        if (folder / "config.json").is_file():
            found = read_json(folder / "config.json")["vqrae_tokenizer_fingerprint"]
            require_same_tokenizer(fingerprint, found, f"generator {folder}")


def train(config: TrainingConfig) -> Path:
    """Train or resume, and return the folder of the finished generator."""
    output = Path(config.output_dir)
    tokenizer = local_model(config.tokenizer)
    fingerprint = weights_fingerprint(tokenizer)
    _require_tokenizer(output, fingerprint)
    run = RunDirectory(output, config, seed=config.seed)
    if trained_steps(output / "model") >= config.optimization.max_steps:
        print(f"finished: {output / 'model'}", flush=True)
        return output / "model"
    check_launch(config.optimization, output)
    visual = VQRAEConfig.from_pretrained(tokenizer)
    samples = open_pairs_or_codes(
        config.data,
        image_size=visual.image_size,
        tokenizer_fingerprint=fingerprint,
        seed=config.seed,
    )
    vocabulary = VisualVocabulary(
        offset=config.model.offset,
        codebook_size=visual.codebook_size,
        num_codes=visual.grid_size**2,
    )
    text_tokenizer = build_text_tokenizer(config.model, lambda: texts_of(samples))
    encode_prompt = fit_prompts(config.model, text_tokenizer, vocabulary)

    # The tokenizer comes before the arguments and these before the model: under ZeRO-3 they decide how it is built.
    encoder = load_encoder(tokenizer)
    code_vectors = encoder.code_vectors() if config.model.embedding_init == "codebook" else None
    in_sequence = {**config.optimization.extra, "train_sampling_strategy": "sequential"}
    arguments = training_arguments(
        dataclasses.replace(config.optimization, extra=in_sequence), output, seed=config.seed
    )
    encode = (
        None
        if is_encoded(samples)
        else functools.partial(encode_images, encoder.to(arguments.device))
    )
    del encoder  # training on shards keeps nothing of it

    run.begin({"tokenizer": fingerprint, "data": data_fingerprint(config.data)})
    torch.manual_seed(config.seed)
    model = build_model(config.model, vocabulary, encode_prompt, bf16=config.optimization.bf16)
    model.config.vqrae_tokenizer = portable_path(config.tokenizer, output / "model")
    model.config.vqrae_tokenizer_fingerprint = fingerprint
    if code_vectors is not None:
        start_from_codebook(model, vocabulary, code_vectors)
    length = config.optimization.max_steps * config.optimization.global_batch_size
    trainer = build_trainer(
        config,
        model,
        arguments,
        TrainingStream(
            samples, length, caption_dropout=config.model.caption_dropout, seed=config.seed
        ),
        encode_prompt,
        vocabulary,
        callback=InstrumentCallback(run, "generator"),
        encode=encode,
    )
    run_trainer(trainer)
    save_model(trainer, output / "model", text_tokenizer.save_pretrained)
    return output / "model"


def main(argv: list[str] | None = None) -> None:
    config = read_config(argv, "training")
    if config.dry_run:
        dry_run(config)
    else:
        train(config)


if __name__ == "__main__":
    run_main(main)
