"""What a person sees of a generator's training: images of a few captions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from vqrae.common.checkpoints import load_model
from vqrae.common.distributed import is_main_process
from vqrae.common.images import image_grid, save_image
from vqrae.common.run import Run
from vqrae.common.trainer import checkpoints
from vqrae.generation.generator import Generator
from vqrae.tokenizer.modeling import VQRAEModel


class PreviewCallback(TrainerCallback):
    """Generates with each checkpoint as it was saved; the model in training is left alone.

    Args:
        run: gets `samples/step-N.png`, and its trackers the same grid.
        tokenizer: folder of the visual tokenizer.
        kind: the class that the finished model is opened with.
        captions: of the images, whose seeds are 0, 1, …; none: nothing is generated.
    """

    def __init__(
        self,
        run: Run,
        text_tokenizer: PreTrainedTokenizerBase | None,
        tokenizer: str | Path,
        *,
        captions: Sequence[str],
        kind: type[Generator] = Generator,
    ) -> None:
        self.run, self.kind = run, kind
        self.text_tokenizer, self.tokenizer = text_tokenizer, tokenizer
        self.captions = captions

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        stopped = control.should_training_stop and state.global_step < state.max_steps
        if stopped or not self.captions or not is_main_process():
            return
        folder = checkpoints(Path(args.output_dir))[-1]
        kind = self.kind.kinds[model.config.model_type]
        with torch.random.fork_rng(devices=[]):  # a resumed run does without these draws
            saved = load_model(kind, folder, dtype=torch.float32, attn_implementation="sdpa")
            tokenizer = VQRAEModel.from_pretrained(self.tokenizer, dtype=torch.float32)
            parts = (saved.to(args.device), self.text_tokenizer, tokenizer.to(args.device))
            generator = self.kind(*parts)
        sampling = generator.sampling
        if not saved.config.caption_dropout:  # it knows no prompt without a caption
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)
        seeds = range(len(self.captions))
        images = generator.images(self.captions, seeds=seeds, sampling=sampling)
        grid = image_grid([[image] for image in images], labels=self.captions)
        save_image(grid, self.run.path / "samples" / f"step-{state.global_step}.png")
        self.run.log_images(state.global_step, {"generated": grid})
