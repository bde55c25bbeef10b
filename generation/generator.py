"""From prompts to images: the trained generator, its text tokenizer and its visual tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vqrae.common.checkpoints import load_model, local_model, require_kind, resolve_model
from vqrae.common.distributed import choose_device
from vqrae.generation.modeling import ClassEncoder, PromptEncoder, Prompts, VisualVocabulary
from vqrae.generation.multi_code import GENERATORS
from vqrae.generation.own_tokenizer import own_tokenizer
from vqrae.generation.sampling import (
    SamplingConfig,
    codes_in_turn,
    read_sampling,
    sample_codes,
)
from vqrae.tokenizer.modeling import VQRAEModel


class Generator:
    """Text to image.

        generator = Generator.from_pretrained("runs/generation")
        images = generator.images(["a photo of a red circle"], seeds=[0])

    Args:
        model: the language model; in fp32 images do not depend on their batch, bf16 is faster.
        tokenizer: the visual tokenizer that its codes belong to.
        compile: compile the language model's forward pass; for CUDA, where it is recorded as a
            graph.
    """

    kinds: ClassVar[dict[str, Any]] = GENERATORS
    """The classes of models by the `model_type` of their folders."""

    def __init__(
        self,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase | None,
        tokenizer: VQRAEModel,
        *,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer.eval()
        self.compile = compile
        self.sampling = read_sampling(model.config)
        self.encode_prompt = self.prompt_encoder(model.config, text_tokenizer)

    @staticmethod
    def prompt_encoder(
        config: PreTrainedConfig, text_tokenizer: PreTrainedTokenizerBase | None
    ) -> Prompts:
        """How a model of that configuration is asked for an image."""
        vocabulary = VisualVocabulary(**config.visual_vocabulary)
        if text_tokenizer is None:
            return ClassEncoder(config.classes, vocabulary)
        return PromptEncoder(
            text_tokenizer,
            vocabulary,
            template=config.prompt_template,
            max_caption_tokens=config.max_caption_tokens,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> "Generator":
        """Load a generator.

        Args:
            name: run directory, model folder or hub id.
            tokenizer: the visual tokenizer, where it has moved since training.
            dtype: of the language model; the tokenizer decodes in fp32.
            compile: as for the class.

        Raises:
            FileNotFoundError: when generator or tokenizer cannot be found.
            ValueError: for another kind of model, for weights that are missing or not finite, and
                for another tokenizer than the one that the generator was trained with.
        """
        folder, device = resolve_model(name), choose_device(device)
        # Everything that can be refused is, before the weights are read.
        values = require_kind(folder, cls.kinds, "a generator (a 'qwen3' with visual_vocabulary)")
        if "visual_vocabulary" not in values:
            raise ValueError(
                f"{folder} is not a generator: its config.json has no visual_vocabulary"
            )
        folder = str(local_model(folder))  # of a hub id: its tokenizer is a folder inside
        visual = own_tokenizer(folder, values, tokenizer)
        kind = cls.kinds[values["model_type"]]
        model = load_model(kind, folder, dtype=dtype, attn_implementation="sdpa")
        return cls(
            model.to(device),
            None if "classes" in values else AutoTokenizer.from_pretrained(folder),
            VQRAEModel.from_pretrained(visual, dtype=torch.float32).to(device),
            compile=compile,
        )

    @torch.inference_mode()
    def images(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One image per prompt, float (B, 3, H, W) in [0, 1] on the CPU.

        Args:
            prompts: captions, or classes; the empty one asks for any image.
            seeds: the same prompt and seed give the same image.
            sampling: how codes are sampled; None: as the model's `config.json` recommends.
            batch_size: images sampled at once; guidance doubles the rows.
            progress: called after every step with (codes done, codes in all).

        Raises:
            ValueError: when prompts and seeds differ in number, or guidance is asked of a model
                that was trained without it.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many")
        vocabulary, size = self.encode_prompt.vocabulary, self.tokenizer.config.output_size
        images = torch.empty(len(prompts), 3, size, size)
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            prompt_ids = [self.encode_prompt(prompt) for prompt in prompts[batch]]

            def report(step: int, _: int, done: int = start, rows: int = len(prompt_ids)) -> None:
                if progress is not None:
                    num_codes = vocabulary.num_codes
                    progress(done * num_codes + rows * step, len(prompts) * num_codes)

            codes = sample_codes(
                self.model,
                prompt_ids,
                self.encode_prompt.unconditional,
                vocabulary,
                sampling or self.sampling,
                seeds[batch],
                compile=self.compile,
                progress=report,
            )
            images[batch] = self.tokenizer.decode(codes.to(self.tokenizer.device))
        return images

    def codes_in_turn(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
    ) -> Iterator[Tensor]:
        """The codes (B,), or (B, n), of one position after the other; arguments as of `images`.

        Raises:
            ValueError: with the first position, as `images`.
        """
        return codes_in_turn(
            self.model,
            [self.encode_prompt(prompt) for prompt in prompts],
            self.encode_prompt.unconditional,
            self.encode_prompt.vocabulary,
            sampling or self.sampling,
            seeds,
            compile=self.compile,
        )
