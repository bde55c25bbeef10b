"""Image generation as a model of lmms-eval 0.7.3, for its tasks that ask for images.

    python -m lmms_eval --model vqrae_generator --model_args generator=runs/generation --tasks WISE
    python -m lmms_eval --model vqrae_generator --model_args generator=RUN,pretrained=RUN \\
        --tasks unig2u_GtA

A task such as WISE asks for an image and reads its path. One such as unig2u_GtA asks for an image
that helps, and then for an answer about its own images and that one: `pretrained` gives it. Our
generators read text alone, so the image that helps comes from the task's words, not from its
images.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqrae.common.cli import progress_line
from vqrae.common.distributed import choose_device
from vqrae.common.images import open_image
from vqrae.eval.generated import ImageRequest, ImagesConfig, claim_folder, make_images
from vqrae.eval.understanding.lmms_eval_model import LMMSEvalModel
from vqrae.understanding.chat import Messages, user_message
from vqrae.understanding.conversation import IMAGE_TOKEN

SEED = 0


class LMMSEvalGenerator(LMMSEvalModel):
    """The model `vqrae_generator` of lmms-eval.

    Args:
        generator: what makes images: run directory, model folder or hub id.
        pretrained: what answers questions about them, if the tasks have any; both may be the same
            unified model.
        images: folder of the images. What is there is taken, if the same generator made it.
    """

    # Tasks of the output type `generate_visual_cot` exist for such models only.
    is_simple = True

    def __init__(
        self,
        generator: str,
        pretrained: str | None = None,
        images: str = "runs/evaluation/lmms_eval/images",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "auto",
    ) -> None:
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        super().__init__(pretrained, batch_size, device, **options)
        precise = "float32" if dtype == "auto" else dtype
        config = ImagesConfig(model=generator, dtype=precise)  # type: ignore[arg-type]
        self.folder = Path(images)
        claim_folder(self.folder, {**config.generation_settings(), "seed": SEED}, "images")
        self.generator = config.load_generator(choose_device(self.device))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """JSON for each request, {"text": "", "images": [path]}: an image of its text."""
        paths = self._images(requests, [request.args[0] for request in requests])
        return [json.dumps({"text": "", "images": [str(path)]}) for path in paths]

    def generate_visual_cot(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, about its images and one that is generated first.

        Raises ValueError without `pretrained`.
        """
        if self.chat is None:
            raise ValueError(
                "this task asks questions: got generator= alone, expected pretrained= as well, an "
                "understanding model, or the same unified model"
            )
        prompts, questions = [], []
        for request in requests:
            prompt, question = two_stages(request.args[0])
            prompts.append(prompt)
            questions.append(question)
        chats: list[Messages] = []
        for request, path, question in zip(
            requests, self._images(requests, prompts), questions, strict=True
        ):
            _, _, doc_to_visual, doc_id, task, split = request.args
            shown = doc_to_visual(self.task_dict[task][split][doc_id])
            chats.append([user_message(question, [*shown, open_image(path)])])
        options = [request.args[1] for request in requests]
        return self.answers(options, questions, lambda index: chats[index])

    def _images(self, requests: Sequence[Any], prompts: Sequence[str]) -> list[Path]:
        """The image files of prompts; those that are missing are generated."""
        wanted = []
        for request, prompt in zip(requests, prompts, strict=True):
            *_, doc_id, task, _ = request.args
            text = hashlib.sha256(prompt.encode()).hexdigest()[:12]
            path = (self.folder / task / f"{doc_id}-{text}.png").resolve()
            wanted.append(ImageRequest(prompt, SEED, path))
        progress = progress_line("images") if self._rank == 0 else lambda done, total: None
        make_images(self.generator, wanted, batch_size=self.batch_size, progress=progress)
        return [request.path for request in wanted]


def two_stages(text: str) -> tuple[str, str]:
    """The prompt of the image that helps, and the question: the whole text where nothing says."""
    parts = {}
    for tag in ("GEN_PROMPT", "QUESTION"):
        found = re.search(rf"\[{tag}\](.*?)\[/{tag}\]", text, re.DOTALL)
        part = found.group(1) if found else text
        # Images are shown apart from the text.
        parts[tag] = part.replace(IMAGE_TOKEN, "").strip()
    return parts["GEN_PROMPT"].replace("{question}", parts["QUESTION"]), parts["QUESTION"]
