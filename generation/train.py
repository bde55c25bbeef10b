"""Train the generator: next-token prediction on the tokenizer's codes (VQRAE, arXiv 2511.23386, section 3.5).

    python -m vqrae.generation.train tiny tokenizer=RUN data=CODES output_dir=RUN [optimization.max_steps=N ...]

The loss is on codes only. The same command resumes an interrupted run and returns at once from a finished one.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM, Trainer

from vqrae.common.checkpoints import local_model, resolve_model
from vqrae.common.distributed import attention_implementation
from vqrae.common.files import read_json, require_same_tokenizer, weights_fingerprint
from vqrae.common.run import RunDirectory
from vqrae.common.trainer import InstrumentCallback, build_optimizers, run_trainer, training_arguments
from vqrae.data.code_shards import CodeDataset
from vqrae.data.scenes import SPRITE_SETS
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation.config import GeneratorModelConfig, TrainingConfig, read_config
from vqrae.generation.model import (
    VisualHead,
    build_generator,
    read_prompt_encoder,
    start_from_codebook,
)
from vqrae.generation.stream import GenerationCollator, TrainingStream
from vqrae.generation.vocabulary import VisualVocabulary
from vqrae.tokenizer import VQRAEModel


def visual_loss(model: nn.Module, batch: dict[str, Tensor], vocabulary: VisualVocabulary) -> Tensor:
    """Mean cross entropy of the codes of a left-padded batch, over the codebook; `model.lm_head` is a `VisualHead`.

    The sequence ends in the N codes, so the last N + 1 positions but one predict them: no other logits are computed.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, logits_to_keep=vocabulary.num_codes + 1, use_cache=False).logits[:, :-1]
    codes = vocabulary.to_codes(batch["labels"][:, -vocabulary.num_codes :])
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


class GeneratorTrainer(Trainer):
    """A `Trainer` whose loss is on the visual rows of the head; `vocabulary` None means the whole vocabulary."""

    def __init__(self, *args: Any, vocabulary: VisualVocabulary | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary = vocabulary
        # Every sample has N codes: the mean over micro-batches is the mean over tokens, no count need be passed on.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.vocabulary is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        return visual_loss(model, inputs, self.vocabulary)


def build_text_tokenizer(config: GeneratorModelConfig, codes: CodeDataset) -> PreTrainedTokenizerBase:
    """The pretrained model's own tokenizer, or a word tokenizer for a new model."""
    if config.llm is not None:
        return AutoTokenizer.from_pretrained(resolve_model(config.llm))
    if config.words == "captions":
        return build_word_tokenizer([text for index in range(len(codes)) for text in codes.captions(index)])
    return build_word_tokenizer([text for sprites in SPRITE_SETS.values() for text in vocabulary_texts(sprites.names)])


def build_model(config: TrainingConfig, vocabulary: VisualVocabulary) -> Qwen3ForCausalLM:
    """The model to train, with everything that sampling needs to know in its `config`."""
    attention = attention_implementation(config.model.attention)
    model = build_generator(vocabulary, llm=config.model.llm, llm_config=config.model.llm_config, attention=attention)
    for name in ("prompt_template", "max_caption_tokens", "caption_dropout"):
        setattr(model.config, name, getattr(config.model, name))
    return model


def _is_finished(run: Path, max_steps: int, fingerprint: str) -> bool:
    """True when the run holds a model trained for `max_steps`.

    Raises:
        ValueError: when a model or checkpoint there speaks the codes of another tokenizer.
    """
    for saved in (*run.glob("model/config.json"), *run.glob("checkpoint-*/config.json")):
        require_same_tokenizer(fingerprint, read_json(saved)["vqrae_tokenizer_fingerprint"], f"generator {saved.parent}")
    state = run / "trainer_state.json"
    return (run / "model" / "config.json").is_file() and state.is_file() and read_json(state)["global_step"] >= max_steps


def _save(trainer: Trainer, text_tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the finished model; every process takes part, for ZeRO-3 gathers the weights."""
    temporary = folder.with_name(".model.tmp")
    trainer.save_model(str(temporary))
    trainer.save_state()
    if trainer.is_world_process_zero():
        text_tokenizer.save_pretrained(temporary)
        (temporary / "training_args.bin").unlink()  # a pickle, and `config.yaml` says it all
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    trainer.accelerator.wait_for_everyone()


def train(config: TrainingConfig) -> Path:
    """Train or resume, and return the folder of the finished generator."""
    output = Path(config.output_dir)
    tokenizer = local_model(config.tokenizer)
    fingerprint = weights_fingerprint(tokenizer)
    if _is_finished(output, config.optimization.max_steps, fingerprint):
        print(f"finished: {output / 'model'}", flush=True)
        return output / "model"
    codes = CodeDataset(config.data, tokenizer_fingerprint=fingerprint)
    vocabulary = VisualVocabulary(
        offset=config.model.offset, codebook_size=codes.manifest.codebook_size, num_codes=codes.manifest.num_codes
    )
    text_tokenizer = build_text_tokenizer(config.model, codes)

    code_vectors = VQRAEModel.from_pretrained(tokenizer).code_vectors() if config.model.embedding_init == "codebook" else None

    # The arguments come before the model: under ZeRO-3 they decide how it is built.
    in_sequence = {**config.optimization.extra, "train_sampling_strategy": "sequential"}
    arguments = training_arguments(dataclasses.replace(config.optimization, extra=in_sequence), output, seed=config.seed)
    run = RunDirectory(output, config, seed=config.seed, fingerprints={"tokenizer": fingerprint, "data": codes.fingerprint()})
    torch.manual_seed(config.seed)
    model = build_model(config, vocabulary)
    model.config.vqrae_tokenizer, model.config.vqrae_tokenizer_fingerprint = str(tokenizer.resolve()), fingerprint
    if code_vectors is not None:
        start_from_codebook(model, vocabulary, code_vectors)
    encode_prompt = read_prompt_encoder(model.config, text_tokenizer)
    if not config.full_vocabulary_loss:
        model.lm_head = VisualHead(model.lm_head, vocabulary.code_rows)
    samples = config.optimization.max_steps * config.optimization.global_batch_size
    trainer = GeneratorTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingStream(codes, samples, caption_dropout=config.model.caption_dropout, seed=config.seed),
        data_collator=GenerationCollator(encode_prompt, vocabulary),
        optimizers=build_optimizers(config.optimization, model),
        callbacks=[InstrumentCallback(run, "generator")],
        vocabulary=None if config.full_vocabulary_loss else vocabulary,
    )
    run_trainer(trainer)
    model.config.use_cache = True  # Trainer turns it off
    _save(trainer, text_tokenizer, output / "model")
    return output / "model"


def main(argv: list[str] | None = None) -> None:
    train(read_config(argv, "training"))


if __name__ == "__main__":
    main()
