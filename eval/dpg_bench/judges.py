"""What answers DPG-Bench's questions, by name. Scores carry it: `DPG(mplug)`.

mplug       the official judge, through the model code of the package modelscope
chat        an image-text-to-text model of transformers, told to say yes or no
endpoint    a server with OpenAI's chat interface, told the same
scenes      the scene detector, for questions about embedded scenes
"""

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from vqrae.common.checkpoints import model_fingerprint
from vqrae.understanding.chat import Chat

JudgeName = Literal["mplug", "chat", "endpoint", "scenes"]
Pairs = Sequence[tuple[Image.Image, str]]
YES_OR_NO = "Answer with yes or no."


class JudgeError(RuntimeError):
    """A judge gave no answer; the prompt counts as failed."""


class Judge(Protocol):
    """Answers questions about images; `identity` says which weights or which service."""

    name: str
    identity: str

    def answer(self, pairs: Pairs) -> list[str]:
        """One answer to each (image, question). Raises JudgeError when there is none."""


class ChatJudge:
    """An image-text-to-text model with a chat template; greedy."""

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 16) -> None:
        self.name, self.identity = f"chat:{Path(model).name}", model_fingerprint(model)
        self.chat = Chat.from_pretrained(model, device=device, max_new_tokens=8)
        self.batch_size = batch_size

    def answer(self, pairs: Pairs) -> list[str]:
        asked = [(image, f"{question} {YES_OR_NO}") for image, question in pairs]
        return self.chat.answer(asked, batch_size=self.batch_size)


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
        urls = {id(image): _data_url(image) for image, _ in pairs}
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: self._ask(urls[id(pair[0])], pair[1]), pairs))

    def _ask(self, image_url: str, question: str) -> str:
        content = [
            {"type": "image_url", "image_url": {"url": image_url}},
            {"type": "text", "text": f"{question} {YES_OR_NO}"},
        ]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 8}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read()[:200].decode(errors='replace')}"
                if error.code < 500 and error.code != 429:  # another attempt would not help
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise JudgeError(f"{self.url} gave no answer: {problem}")


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
        from vqrae.eval.dpg_bench.scenes import SceneJudge

        return SceneJudge(sprites)
    if name == "mplug":
        from vqrae.eval.dpg_bench.mplug import MPLUG, MPlug  # modelscope is an optional package

        return MPlug(model or MPLUG, device)
    if name == "chat" and model is not None:
        return ChatJudge(model, device)
    if name == "endpoint" and model is not None and url is not None:
        return EndpointJudge(url, model)
    needed = "judge_url= and judge_model=" if name == "endpoint" else "judge_model="
    raise ValueError(f"judge={name} needs {needed}")
