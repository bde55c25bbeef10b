"""From prompts to images: the trained generator, its text tokenizer and its visual tokenizer."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from vqrae.common.checkpoints import load_model, local_model, resolve_model
from vqrae.common.distributed import choose_device
from vqrae.common.files import require_same_tokenizer, weights_fingerprint
from vqrae.generation.modeling import (
    find_tokenizer,
    read_prompt_encoder,
    read_sampling,
    read_vocabulary,
    require_generator,
)
from vqrae.generation.prepacking import prepacked_linears
from vqrae.generation.sampling import SamplingConfig, sample_codes
from vqrae.tokenizer.modeling import VQRAEModel

Progress = Callable[[int, int], None]
"""Called with (codes done, codes in all)."""


class Generator:
    """Text to image.

        generator = Generator.from_pretrained("runs/generator")
        images = generator.images(["a photo of a red circle"], seeds=[0])

    Args:
        model: the language model; samples are exactly reproducible across batch sizes in fp32, faster in bf16.
        tokenizer: the visual tokenizer that its codes belong to.
        compile: compile the language model's forward pass; for CUDA, where it is recorded as a graph.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        text_tokenizer: PreTrainedTokenizerBase,
        tokenizer: VQRAEModel,
        *,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.compile = model.eval(), tokenizer.eval(), compile
        self.vocabulary, self.sampling = read_vocabulary(model.config), read_sampling(model.config)
        self.encode_prompt = read_prompt_encoder(model.config, text_tokenizer)

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
            tokenizer: the visual tokenizer, where it no longer lies at the place that training recorded.
            dtype: of the language model; the tokenizer decodes in fp32.
            compile: as for the class.

        Raises:
            FileNotFoundError: when generator or tokenizer cannot be found.
            ValueError: when the model is no generator, when weights are missing or not finite, and when the tokenizer is not
                the one that the generator was trained with.
        """
        folder, device = resolve_model(name), choose_device(device)
        require_generator(folder)
        model = load_model(Qwen3ForCausalLM, folder, dtype=dtype, attn_implementation="sdpa")
        recorded = model.config.vqrae_tokenizer
        try:
            visual = local_model(tokenizer) if tokenizer else find_tokenizer(recorded, folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"generator {folder} needs the visual tokenizer {tokenizer or recorded} (weights "
                f"{model.config.vqrae_tokenizer_fingerprint[:16]}), which cannot be found: name its folder with tokenizer=..."
            ) from error
        artefact = f"generator {folder} (trained with {recorded}, asked to decode with {visual})"
        require_same_tokenizer(
            weights_fingerprint(visual), model.config.vqrae_tokenizer_fingerprint, artefact
        )
        text_tokenizer = AutoTokenizer.from_pretrained(folder)
        generator = cls(
            model,
            text_tokenizer,
            VQRAEModel.from_pretrained(visual, dtype=torch.float32),
            compile=compile,
        )
        return generator.to(device)

    def to(self, device: str | torch.device) -> "Generator":
        """Move both models to a device."""
        for module in (self.model, self.tokenizer):
            torch.nn.Module.to(module, device)
        return self

    def codes(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample the codes (B, N) of one image per prompt; the same prompt and seed give the same image.

        Args:
            prompts: captions; the empty one asks for any image.
            sampling: how codes are drawn; None: as the model's `config.json` recommends.
            batch_size: images sampled at once (guidance doubles the rows); images of one prompt side by side share it.
            progress: called after every step with codes done and codes in all.

        Raises:
            ValueError: when prompts and seeds differ in number, or guidance is asked of a model trained without it.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many")
        sampling = sampling or self.sampling
        total, sampled = len(prompts) * self.vocabulary.num_codes, []
        with nullcontext() if self.compile else prepacked_linears(self.model.model):
            for start in range(0, len(prompts), batch_size):
                chunk = [
                    self.encode_prompt(prompt) for prompt in prompts[start : start + batch_size]
                ]

                def report(step: int, _: int, start: int = start, rows: int = len(chunk)) -> None:
                    if progress is not None:
                        progress(start * self.vocabulary.num_codes + rows * step, total)

                sampled.append(
                    sample_codes(
                        self.model,
                        chunk,
                        self.encode_prompt.unconditional,
                        self.vocabulary,
                        sampling,
                        seeds[start : start + batch_size],
                        compile=self.compile,
                        progress=report,
                    )
                )
        return (
            torch.cat(sampled)
            if sampled
            else torch.empty(0, self.vocabulary.num_codes, dtype=torch.long)
        )

    @torch.inference_mode()
    def images(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample one image per prompt, float (B, 3, H, W) in [0, 1] on the CPU; arguments as in `codes`."""
        codes = self.codes(
            prompts, seeds=seeds, sampling=sampling, batch_size=batch_size, progress=progress
        )
        if not len(codes):
            return torch.empty(
                0, 3, self.tokenizer.config.image_size, self.tokenizer.config.image_size
            )
        device = self.tokenizer.device
        return torch.cat(
            [self.tokenizer.decode(chunk.to(device)).cpu() for chunk in codes.split(batch_size)]
        )
