"""What answers a benchmark's questions about images, by name. Scores carry it: `DPG(mplug)`.

mplug       DPG-Bench's official judge, through the model code of the package modelscope
chat        an image-text-to-text model of transformers
endpoint    a server with OpenAI's chat interface
scenes      the scene detector, for questions about embedded scenes
"""

import base64
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList

from vqrae.common.checkpoints import model_fingerprint
from vqrae.eval.generated import ImagesConfig
from vqrae.understanding.chat import Chat, Messages, user_message

JudgeName = Literal["mplug", "chat", "endpoint", "scenes"]
Pairs = Sequence[tuple[Image.Image, str]]
Expected = Sequence[tuple[Image.Image, str, Sequence[str]]]
"""Images, questions, and the ways to write the right answer."""
T = TypeVar("T")
YES_OR_NO = "Answer with yes or no."
# GenEval 2's judge is told so: other words would move its probabilities.
ONE_WORD = "Answer in one word."
TOP_TOKENS = 20  # the most that OpenAI and, by default, vLLM tell the probabilities of


class JudgeError(RuntimeError):
    """A judge gave no answer; the prompt counts as failed."""


class Judge(Protocol):
    """Answers questions about images; `identity` says which weights or which service."""

    name: str
    identity: str

    def answer(self, pairs: Pairs) -> list[str]:
        """One answer to each (image, question). Raises JudgeError when there is none."""


@runtime_checkable
class SoftJudge(Judge, Protocol):
    """A judge that also says how sure it is."""

    def probabilities(self, expected: Expected) -> list[float]:
        """The probability, in [0, 1], that a one-word answer begins as one of the given ways."""


class ChatJudge:
    """An image-text-to-text model with a chat template, such as Qwen3-VL; greedy."""

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 16) -> None:
        self.name, self.identity = f"chat:{Path(model).name}", model_fingerprint(model)
        self.chat = Chat.from_pretrained(model, device=device, max_new_tokens=8)
        self.batch_size = batch_size

    def answer(self, pairs: Pairs) -> list[str]:
        asked = [(image, f"{question} {YES_OR_NO}") for image, question in pairs]
        return self.chat.answer(asked, batch_size=self.batch_size)

    def probabilities(self, expected: Expected) -> list[float]:
        found = []
        for start in range(0, len(expected), self.batch_size):
            batch = expected[start : start + self.batch_size]
            chats = [[user_message(f"{text} {ONE_WORD}", image)] for image, text, _ in batch]
            chances_BV = self.first_token_probabilities(chats)
            for chances_V, (_, _, ways) in zip(chances_BV, batch, strict=True):
                found.append(float(chances_V[self._first_tokens(ways)].sum()))
        return found

    @torch.inference_mode()
    def first_token_probabilities(self, chats: Sequence[Messages]) -> Tensor:
        """How likely each token begins the next answer of each chat: float (B, V), on the CPU."""
        seen: list[Tensor] = []

        def keep(input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(scores)
            return scores

        # `generate` and no plain forward pass: it makes the positions of padded rows.
        self.chat.model.generate(
            **self.chat.inputs(chats),
            do_sample=False,
            max_new_tokens=1,
            logits_processor=LogitsProcessorList([keep]),
        )
        return seen[0].float().softmax(-1).cpu()

    def _first_tokens(self, ways: Sequence[str]) -> list[int]:
        """The different first tokens of some texts."""
        tokenizer = self.chat.text_tokenizer
        ids = [tokenizer(way, add_special_tokens=False)["input_ids"][:1] for way in ways]
        # A set: where two ways share their first token, its probability counts once.
        first = {found[0] for found in ids if found} - {tokenizer.unk_token_id}
        if not first:
            raise JudgeError(f"{self.name} cannot say {ways[0]!r}: its tokenizer has no such word")
        return sorted(first)


class EndpointJudge:
    """A server with OpenAI's chat interface (vLLM, SGLang, llama.cpp, OpenAI …).

    The url ends with the version, as in http://localhost:8000/v1; `key` is by default
    $OPENAI_API_KEY. A question is asked `attempts` times, with waits of 1, 2, 4 … seconds, and
    `workers` at once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        attempts: int = 4,
        timeout: float = 120,
        workers: int = 8,
    ) -> None:
        self.name, self.identity = f"endpoint:{model}", f"{model} at {url}"
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.attempts, self.timeout = attempts, timeout
        self.workers = workers
        key = key if key is not None else os.environ.get("OPENAI_API_KEY", "")
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def answer(self, pairs: Pairs) -> list[str]:
        asked = [(image, f"{question} {YES_OR_NO}") for image, question in pairs]
        return self._ask_all(asked, lambda said: str(said["message"]["content"]), max_tokens=8)

    def probabilities(self, expected: Expected) -> list[float]:
        """As `SoftJudge`, of those ways that are one of the likeliest first tokens."""
        asked = [(image, f"{question} {ONE_WORD}") for image, question, _ in expected]
        options = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_TOKENS}
        found = self._ask_all(asked, _first_token_chances, **options)
        chances = []
        for likeliest, (_, _, ways) in zip(found, expected, strict=True):
            chances.append(sum(likeliest.get(way, 0.0) for way in dict.fromkeys(ways)))
        return chances

    def _ask_all(
        self, asked: Pairs, read: Callable[[dict[str, Any]], T], **options: Any
    ) -> list[T]:
        """What `read` takes from the server's choice for each image and text."""
        urls = {id(image): _data_url(image) for image, _ in asked}
        with ThreadPoolExecutor(self.workers) as pool:
            return list(
                pool.map(lambda pair: self._ask(urls[id(pair[0])], pair[1], read, options), asked)
            )

    def _ask(
        self, image_url: str, text: str, read: Callable[[dict[str, Any]], T], options: dict
    ) -> T:
        content = [
            {"type": "image_url", "image_url": {"url": image_url}},
            {"type": "text", "text": text},
        ]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, **options}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return read(json.load(response)["choices"][0])
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read()[:200].decode(errors='replace')}"
                if error.code < 500 and error.code != 429:  # another attempt would not help
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise JudgeError(f"{self.url} gave no answer: {problem}")


def _first_token_chances(choice: dict[str, Any]) -> dict[str, float]:
    """Probabilities of a server's likeliest first tokens, by their text."""
    likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
    return {token["token"]: math.exp(token["logprob"]) for token in likeliest}


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def build_judge(
    name: JudgeName,
    *,
    model: str | None = None,
    url: str | None = None,
    sprites: str = "shapes",
    device: str = "cpu",
) -> Judge:
    """The judge of that name; ValueError when an argument or a package is missing.

    `model` is a folder or hub id, or what an endpoint at `url` calls its model.
    """
    if name == "scenes":
        from vqrae.eval.judges.scenes import SceneJudge

        return SceneJudge(sprites)
    if name == "mplug":
        from vqrae.eval.judges.mplug import MPLUG, MPlug  # modelscope is an optional package

        return MPlug(model or MPLUG, device)
    if name == "chat" and model is not None:
        return ChatJudge(model, device)
    if name == "endpoint" and model is not None and url is not None:
        return EndpointJudge(url, model)
    needed = "judge_url= and judge_model=" if name == "endpoint" else "judge_model="
    raise ValueError(f"judge={name} needs {needed}")


@dataclass(frozen=True, kw_only=True)
class JudgedConfig(ImagesConfig):
    """Where the images of a benchmark come from, and what answers its questions about them."""

    output: str
    """Folder of everything that is written."""
    num_prompts: int | None = None
    """Take the first prompts only."""
    judge: JudgeName = "scenes"
    """What answers: mplug, chat, endpoint or scenes."""
    judge_model: str | None = None
    """Its weights: folder or hub id; what an endpoint calls its model."""
    judge_url: str | None = None
    """Of an endpoint, such as http://localhost:8000/v1."""
    sprites: str = "shapes"
    """What scenes are made of: shapes or emoji."""

    def load_judge(self, device: str) -> Judge:
        """The judge, see `build_judge`."""
        return build_judge(
            self.judge,
            model=self.judge_model,
            url=self.judge_url,
            sprites=self.sprites,
            device=device,
        )
