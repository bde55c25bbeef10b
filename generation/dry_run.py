"""`dry_run=N`: the real configuration for N steps of its longest sequences, then what it took and what the full run would need.

Nothing is downloaded and nothing is kept (see `vqrae.common.dry_run`). The codes are random; the global batch is one
micro-batch of every process, and on CPU that is one sequence.
"""

import dataclasses
import sys
import tempfile
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Qwen3ForCausalLM, TrainerCallback

from vqrae.common.checkpoints import resolve_model
from vqrae.common.distributed import is_main_process, world_size
from vqrae.common.dry_run import GPUS, DryRunReport, held_bytes, is_here, peak_bytes
from vqrae.common.memory import count_parameters, state_bytes
from vqrae.common.run import RunDirectory
from vqrae.common.trainer import run_trainer, training_arguments
from vqrae.generation.config import TrainingConfig
from vqrae.generation.modeling import PromptEncoder, VisualVocabulary
from vqrae.generation.train import build_model, build_text_tokenizer, build_trainer, fit_prompts
from vqrae.tokenizer.configuration import VQRAEConfig

PUBLISHED_CODEBOOK, PUBLISHED_CODES = (
    16_384,
    1024,
)  # of the InternViT tokenizer (paper, section 3.5)


def dry_run(config: TrainingConfig) -> None:
    """Rehearse a training and print a report.

    Raises:
        ValueError: when neither the language model nor its configuration is known on this machine.
    """
    before = held_bytes()
    vocabulary = expected_vocabulary(config)
    short = rehearsal(config)
    encode_prompt = fit_prompts(
        short.model, build_text_tokenizer(short.model, [], list), vocabulary
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(short.optimization, folder, seed=config.seed)
        RunDirectory(folder, short, seed=config.seed).begin()
        torch.manual_seed(config.seed)
        model = build_model(short.model, vocabulary, encode_prompt, bf16=short.optimization.bf16)
        parts = count_parts(model, vocabulary)
        stream, clock = LongestSamples(encode_prompt, vocabulary), StepClock(config.dry_run)
        run_trainer(
            build_trainer(
                short, model, arguments, stream, encode_prompt, vocabulary, callback=clock
            )
        )
    total = parts["generator, total"][0]
    length = encode_prompt.max_caption_tokens + encode_prompt.template_length + vocabulary.num_codes

    def states(zero: int, gpus: int) -> float:
        width = (
            2 if zero and config.optimization.bf16 else 4
        )  # DeepSpeed keeps weights and gradients in bf16
        return state_bytes(width * total, total, zero=zero, gpus=gpus, gradient_bytes=width)

    report = DryRunReport(
        name="the generator",
        samples=f"sequences of {length:,}",
        parts=parts,
        seconds=clock.seconds,
        before_bytes=before,
        peak_bytes=peak_bytes(),
        model_bytes=states(short.optimization.zero, world_size()),
        gpu_bytes={zero: states(zero, GPUS) for zero in (0, 1, 2, 3)},
        micro_batch_size=short.optimization.micro_batch_size,
        activation_checkpointing=arguments.gradient_checkpointing,
        max_steps=config.optimization.max_steps,
        global_batch_size=config.optimization.global_batch_size,
    )
    if is_main_process():
        print(report.text(), flush=True)


def rehearsal(config: TrainingConfig) -> TrainingConfig:
    """The configuration of a dry run: one micro-batch of every process a step, from random weights if need be."""
    micro = config.optimization.micro_batch_size if torch.cuda.is_available() else 1
    short = dataclasses.replace(
        config.optimization,
        max_steps=config.dry_run,
        micro_batch_size=micro,
        global_batch_size=micro * world_size(),
        dataloader_num_workers=0,
    )
    model = config.model
    if model.llm is not None and not is_here(model.llm):
        if model.llm_config is None:
            raise ValueError(
                f"{model.llm} is not on this machine: describe it in model.llm_config, or fetch it first"
            )
        model = dataclasses.replace(model, llm=None)
    return dataclasses.replace(config, optimization=short, model=model)


def expected_vocabulary(config: TrainingConfig) -> VisualVocabulary:
    """The vocabulary for the configured tokenizer, or for the published one where that is not on this machine."""
    codebook_size, num_codes = PUBLISHED_CODEBOOK, PUBLISHED_CODES
    try:
        folder = resolve_model(config.tokenizer)
    except FileNotFoundError:
        folder = ""
    if folder and is_here(folder):
        visual = VQRAEConfig.from_pretrained(folder)
        codebook_size, num_codes = visual.codebook_size, visual.grid_size**2
    else:
        print(
            f"tokenizer {config.tokenizer} is not here: {num_codes:,} codes out of {codebook_size:,}",
            file=sys.stderr,
        )
    return VisualVocabulary(
        offset=config.model.offset, codebook_size=codebook_size, num_codes=num_codes
    )


def count_parts(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> dict[str, tuple[int, int]]:
    """Parameters (all, trained) by name."""
    codes = vocabulary.codebook_size * model.config.hidden_size
    return {
        "transformer blocks": count_parameters(model.model.layers),
        "embedding": count_parameters(model.model.embed_tokens),
        "  of which codes": (codes, codes),
        "generator, total": count_parameters(model),
    }


class LongestSamples(Dataset):
    """Random codes, each after a caption of the greatest length that is allowed."""

    def __init__(self, encode_prompt: PromptEncoder, vocabulary: VisualVocabulary) -> None:
        self.caption = "a " * encode_prompt.max_caption_tokens
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(index)
        codes: Tensor = torch.randint(
            self.vocabulary.codebook_size, (self.vocabulary.num_codes,), generator=rng
        )
        return {"codes": codes, "caption": self.caption}


class StepClock(TrainerCallback):
    """Times the optimizer steps, says so, and keeps the trainer from saving."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds = steps, list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)
        control.should_save = False
        if is_main_process():
            print(
                f"dry run: step {len(self.seconds)}/{self.steps} took {self.seconds[-1]:.1f} s",
                flush=True,
            )
