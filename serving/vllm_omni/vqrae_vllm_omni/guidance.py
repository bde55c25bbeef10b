"""The next codes of all images in a step of the engine.

An image is two requests: one with its caption, and a companion without, whose id has `SUFFIX`. Both
get the same code. It is the one that `vqrae generate` draws: guidance, filters and random numbers
are those of `vqrae.generation.sampling`.

Shapes: R requests in any order, B images, N positions of an image, K codes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.sampling import (
    SamplingConfig,
    draw_codes,
    guidance_scales,
    guide,
    image_uniforms,
)

SUFFIX = "__without_caption"
KEY = "vqrae"
"""Of the seed and the sampling of an image, in what vLLM-Omni keeps of a request."""


def next_ids(
    logits_RK: Tensor, infos: Sequence[Mapping[str, Any]], vocabulary: VisualVocabulary
) -> Tensor:
    """The token id (R,) that each request goes on with.

    Args:
        logits_RK: of the codes alone.
        infos: what vLLM-Omni keeps of each request: `global_request_id`, `generated_len`, and
            under `KEY` what `prompts.Prompts` wrote.

    Raises:
        ValueError: when only one half of an image is there.
    """
    rows = {info["global_request_id"][0]: row for row, info in enumerate(infos)}
    images = [request for request in rows if not request.endswith(SUFFIX)]
    if set(rows) != {*images, *(image + SUFFIX for image in images)}:
        raise ValueError(
            f"got the requests {sorted(rows)}, expected each with its companion {SUFFIX}: use the "
            "scheduler that deploy.yaml names"
        )
    # Images that began together draw together.
    groups: dict[tuple[int, SamplingConfig], list[str]] = defaultdict(list)
    for image in images:
        info = infos[rows[image]]
        groups[info["generated_len"], SamplingConfig(**info[KEY]["sampling"])].append(image)
    ids_R = torch.empty(len(infos), dtype=torch.int64, device=logits_RK.device)
    for (place, config), members in groups.items():
        with_caption = [rows[image] for image in members]
        without = [rows[image + SUFFIX] for image in members]
        seeds = [infos[row][KEY]["seed"] for row in with_caption]
        scale = guidance_scales(config, vocabulary.num_codes)[place]
        logits_BK = guide(logits_RK[with_caption].float(), logits_RK[without].float(), scale)
        uniforms_B = image_uniforms(seeds, vocabulary.num_codes)[:, place].to(logits_RK.device)
        ids_B = vocabulary.to_ids(draw_codes(logits_BK, uniforms_B, config))
        ids_R[with_caption] = ids_R[without] = ids_B
    return ids_R
