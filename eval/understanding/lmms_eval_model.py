"""Our LLaVA, a graft, or any image-text model of transformers as a chat model of lmms-eval 0.7.3.

lmms-eval's own LLaVA wrapper reads the same folder. Here questions are answered in batches, with
the answers of batch size 1, and a question that fails ends the run instead of scoring as an empty
answer."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from vqrae.common.cli import progress_line
from vqrae.mllm.inference import open_chat
from vqrae.understanding.chat import Chat, Messages

DEFAULT_MAX_NEW_TOKENS = 1024  # of lmms-eval's wrappers, where a task says nothing
SAMPLING = ("temperature", "top_p", "top_k", "num_beams")


class LMMSEvalModel(lmms):
    """The model `vqrae` of lmms-eval; `pretrained` is a run directory, model folder or hub id."""

    is_simple = False

    def __init__(
        self,
        pretrained: str | None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        shared = self._world_size > 1 or device is None
        self.device = self.accelerator.device if shared else torch.device(str(device))
        self.batch_size = int(batch_size)
        self.chat: Chat | None = None
        if pretrained is not None:
            options = {"dtype": dtype, "attn_implementation": attn_implementation}
            self.chat = open_chat(pretrained, device=self.device, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer to each request, in their order."""
        options = [request.args[2] for request in requests]
        texts = [str(request.args[0]) for request in requests]
        return self.answers(options, texts, lambda index: self._messages(requests[index].args))

    def answers(
        self,
        options: Sequence[dict[str, Any]],
        texts: Sequence[str],
        messages: Callable[[int], Messages],
    ) -> list[str]:
        """One answer to each question, in their order.

        Args:
            options: a task's `generation_kwargs` for each.
            texts: what tells their lengths.
            messages: the chat of the question with an index.
        """
        assert self.chat is not None
        answers: dict[int, str] = {}
        progress = progress_line("questions")
        for chosen, indices in alike(options, texts):
            stops = chosen.pop("until")
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                chats = [messages(index) for index in batch]
                for index, text in zip(batch, self.chat.generate(chats, **chosen), strict=True):
                    answers[index] = cut(text, stops)
                if self._rank == 0:
                    progress(len(answers), len(texts))
        return [answers[index] for index in range(len(texts))]

    def _messages(self, arguments: tuple[Any, ...]) -> Messages:
        """The chat of a request, which has six fields in lmms-eval 0.7.3; its guide names five."""
        _, doc_to_messages, _, doc_id, task, split = arguments
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(
                f"task {task}, document {doc_id}: got video or sound, expected images and text only"
            )
        return messages.to_hf_messages()

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Not offered: none of the paper's benchmarks asks for it."""
        raise NotImplementedError("vqrae answers questions; it does not score given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Not offered."""
        raise NotImplementedError("vqrae answers one question at a time, not several rounds")


def alike(
    options: Sequence[dict[str, Any]], texts: Sequence[str]
) -> list[tuple[dict[str, Any], list[int]]]:
    """Questions that may share a batch: same generation options, sorted by length."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, given in enumerate(options):
        groups[json.dumps(chat_options(given), sort_keys=True)].append(index)
    for indices in groups.values():
        indices.sort(key=lambda index: -len(texts[index]))
    return [(json.loads(options), indices) for options, indices in groups.items()]


def chat_options(given: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as `Chat.generate` takes them, and `until`."""
    sampling = {name: given[name] for name in SAMPLING if given.get(name) is not None}
    if sampling.get("temperature"):
        sampling["do_sample"] = True
    else:  # a temperature of 0 means greedy, as in lmms-eval
        sampling = {name: value for name, value in sampling.items() if name == "num_beams"}
    stops = given.get("until") or []
    return {
        "max_new_tokens": given.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
        "sampling": sampling,
        "until": [stops] if isinstance(stops, str) else list(stops),
    }


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))].strip()
