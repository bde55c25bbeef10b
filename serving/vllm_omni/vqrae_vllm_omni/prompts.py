"""A caption becomes two prompts of the language model; its answer becomes codes.

vLLM-Omni finds these functions by name and gives them no model. So the generator that this process
serves is remembered: `plugin.pipeline` names it before any request comes.
"""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from vqrae.generation.generator import Generator
from vqrae.generation.sampling import read_sampling
from vqrae_vllm_omni.guidance import KEY, SUFFIX


class Prompts:
    """How one generator is asked.

    Args:
        config: of its folder, whose name is in `name_or_path`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        by_class = hasattr(config, "classes")
        text = None if by_class else AutoTokenizer.from_pretrained(config.name_or_path)
        self.encode = Generator.prompt_encoder(config, text)
        self.sampling = read_sampling(config)
        self.without_guidance = getattr(config, "caption_dropout", None) == 0

    def with_caption(self, prompt: Any, parameters: Sequence[Any]) -> dict[str, Any]:
        """The prompt of a caption, with the seed and the sampling of its image.

        Args:
            prompt: the caption, or a dictionary with it as `prompt` and perhaps fields of
                `SamplingConfig` as `sampling`.
            parameters: of both stages: `seed` of the first, `guidance_scale` of the second.

        Raises:
            ValueError: for what this generator cannot do.
        """
        given = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        first, second = parameters[0], parameters[-1]
        if (count := getattr(second, "num_outputs_per_prompt", 1)) != 1:
            raise ValueError(f"got {count} images of a request, expected 1: send more requests")
        chosen = dict(given.get("sampling") or {})
        if getattr(second, "guidance_scale_provided", False):
            chosen["guidance_scale"] = second.guidance_scale
        sampling = replace(self.sampling, **chosen)
        if self.without_guidance and sampling.guidance_scale != 1:
            raise ValueError(
                f"got guidance_scale {sampling.guidance_scale}, expected 1: this generator was "
                "trained with caption_dropout 0"
            )
        seed = first.seed if first.seed is not None else secrets.randbits(32)
        return self._tokens(given["prompt"], "cond", {"seed": seed, "sampling": asdict(sampling)})

    def without_caption(self) -> dict[str, Any]:
        """The prompt of the companion."""
        return self._tokens("", "uncond", {})

    def codes(self, ids: Sequence[int]) -> list[int]:
        """The codes of an answer.

        Raises:
            ValueError: for an answer that is not one image.
        """
        vocabulary = self.encode.vocabulary
        codes = [each - vocabulary.offset for each in ids]
        inside = sum(0 <= code < vocabulary.codebook_size for code in codes)
        if not len(codes) == inside == vocabulary.num_codes:
            raise ValueError(
                f"got {len(codes)} ids, {inside} of them codes, "
                f"expected {vocabulary.num_codes} codes"
            )
        return codes

    def _tokens(self, caption: str, role: str, values: dict[str, Any]) -> dict[str, Any]:
        group = {"role": role, "uncond_suffix": SUFFIX}  # what the scheduler pairs by
        kept = {KEY: values, "cfg_group": group}
        return {"prompt_token_ids": self.encode(caption), "additional_information": kept}


# ---- the functions that vLLM-Omni calls

_served: list[Prompts] = []


def serve(config: PreTrainedConfig) -> None:
    """Remember the generator of this process."""
    _served[:] = [Prompts(config)]


def transform(prompt: Any, parameters: Sequence[Any]) -> dict[str, Any]:
    """What the first stage reads of a request."""
    return _served[0].with_caption(prompt, parameters)


def expand(prompt: Any, parameters: Any) -> list[Any]:
    """The companion of a request."""
    from vllm_omni.model_executor.stage_input_processors.bagel import ExpandedPrompt

    return [ExpandedPrompt(_served[0].without_caption(), "uncond", SUFFIX)]


def to_pixels(outputs: Sequence[Any], prompt: Any, multimodal: bool = False) -> dict[str, Any]:
    """What the second stage reads; the companion's output comes after that of the request."""
    codes = _served[0].codes(outputs[0].outputs[0].cumulative_token_ids)
    return {"prompt": "", "codes": codes}
