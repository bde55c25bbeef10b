"""The second stage: codes to pixels by the visual tokenizer that the generator was trained with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vqrae.common.checkpoints import resolve_model
from vqrae.common.files import read_json
from vqrae.common.images import tensor_to_image
from vqrae.generation.own_tokenizer import own_tokenizer
from vqrae.tokenizer.modeling import VQRAEModel


class PixelStage(nn.Module):
    """A pipeline in the sense of vLLM-Omni, with one step."""

    supports_request_batch = True

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__()
        folder = resolve_model(od_config.model)
        config = read_json(f"{folder}/config.json")
        visual = own_tokenizer(folder, config, None)
        self.tokenizer = VQRAEModel.from_pretrained(visual, dtype=torch.float32).eval()
        self.num_codes = config["visual_vocabulary"]["num_codes"]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """All of them: they are read on construction, from the tokenizer's folder."""
        return {name for name, _ in self.named_parameters()}

    @torch.inference_mode()
    def forward(self, batch: Any) -> list[Any]:
        """An output (1, 3, H, W) in [0, 1] for each request; of zeros while the engine warms up."""
        from vllm_omni.diffusion.data import DiffusionOutput

        zeros = {"codes": [0] * self.num_codes}
        codes = [({**zeros, **prompt} if prompt else zeros)["codes"] for prompt in batch.prompts]
        images = self.tokenizer.decode(torch.tensor(codes, device=self.tokenizer.device))
        return [DiffusionOutput(output=image[None]) for image in images]


def post_process(od_config: Any) -> Callable[[Tensor], list[Image.Image]]:
    """What turns an output into images for the answer."""
    return lambda images: [tensor_to_image(image) for image in images]
