"""What answers DPG-Bench's questions, by name. Scores are called after it: `DPG(mplug)`.

mplug           the official judge, through the model code of the package modelscope
vqa             a visual question answering model of transformers (BLIP, ViLT)
chat            an image-text-to-text model of transformers, told to say yes or no
endpoint        a server with OpenAI's chat interface, told the same
understanding   our understanding model, asked as it was trained
scenes          the scene detector, for questions about embedded scenes
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
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from vqrae.common.checkpoints import load_model, resolve_model
from vqrae.eval.manifest import model_fingerprint

JudgeName = Literal["mplug", "vqa", "chat", "endpoint", "understanding", "scenes"]
YES_OR_NO = "Answer with yes or no."


class JudgeError(RuntimeError):
    """A judge gave no answer; the prompt counts as failed."""


class VQA(Protocol):
    """Answers questions about images; `identity` says which weights or which service."""

    name: str
    identity: str

    def answer(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        """One answer to each (image, question).

        Raises:
            JudgeError: when there is none.
        """


class TransformersVQA:
    """A model that transformers lists for visual question answering: one that generates the answer, or classifies (ViLT)."""

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 16) -> None:
        from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

        folder = resolve_model(model)
        self.name, self.identity, self.batch_size = (
            f"vqa:{Path(model).name}",
            model_fingerprint(model),
            batch_size,
        )
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = load_model(AutoModelForVisualQuestionAnswering, folder).eval().to(device)

    @torch.inference_mode()
    def answer(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        from transformers import ViltForQuestionAnswering

        answers: list[str] = []
        for start in range(0, len(pairs), self.batch_size):
            images, questions = zip(*pairs[start : start + self.batch_size], strict=True)
            inputs = self.processor(
                images=list(images), text=list(questions), padding=True, return_tensors="pt"
            )
            inputs = inputs.to(self.model.device)
            if isinstance(self.model, ViltForQuestionAnswering):
                labels = self.model(**inputs).logits.argmax(-1).tolist()
                answers += [self.model.config.id2label[label] for label in labels]
            else:
                answers += self.processor.batch_decode(
                    self.model.generate(**inputs, max_new_tokens=16), skip_special_tokens=True
                )
        return answers


class ChatVQA:
    """An image-text-to-text model with a chat template; greedy.

    Args:
        instruction: said behind every question.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        instruction: str | None,
        device: str = "cpu",
        batch_size: int = 16,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from vqrae.understanding.chat import Chat

        folder = resolve_model(model)
        self.name, self.identity = f"{kind}:{Path(model).name}", model_fingerprint(model)
        self.instruction, self.batch_size = instruction, batch_size
        network = load_model(AutoModelForImageTextToText, folder, dtype="auto").to(device)
        self.chat = Chat(network, AutoProcessor.from_pretrained(folder), max_new_tokens=8)

    def answer(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        behind = f" {self.instruction}" if self.instruction else ""
        return self.chat.answer(
            [(image, question + behind) for image, question in pairs], batch_size=self.batch_size
        )


class EndpointVQA:
    """A server with OpenAI's chat interface (vLLM, SGLang, llama.cpp, OpenAI …); images travel as PNG.

    Args:
        url: up to and including the version, such as http://localhost:8000/v1.
        model: as the server calls it.
        key: sent as a bearer token; the variable OPENAI_API_KEY when not given.
        attempts: before an answer counts as missing; waits 1, 2, 4 … seconds in between.
        workers: questions under way at once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        instruction: str | None = YES_OR_NO,
        key: str | None = None,
        attempts: int = 4,
        timeout: float = 120,
        workers: int = 8,
    ) -> None:
        self.name, self.identity = f"endpoint:{model}", f"{model} at {url}"
        self.url, self.model, self.instruction = (
            url.rstrip("/") + "/chat/completions",
            model,
            instruction,
        )
        self.key = key if key is not None else os.environ.get("OPENAI_API_KEY", "")
        self.attempts, self.timeout, self.workers = attempts, timeout, workers

    def answer(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        urls = {id(image): _data_url(image) for image, _ in pairs}
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: self._ask(urls[id(pair[0])], pair[1]), pairs))

    def _ask(self, image: str, question: str) -> str:
        text = f"{question} {self.instruction}" if self.instruction else question
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": text},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 8,
        }
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read()[:200].decode(errors='replace')}"
                if error.code < 500 and error.code != 429:  # asking again would not help
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
    batch_size: int = 16,
) -> VQA:
    """The judge of that name.

    Args:
        model: folder or hub id; what an endpoint calls its model.
        url: of an endpoint.
        sprites: what scenes are made of.

    Raises:
        ValueError: when an argument or a package is missing.
    """
    if name == "scenes":
        from vqrae.eval.dpg_bench.scenes import SceneVQA

        return SceneVQA(sprites)
    if name == "mplug":
        from vqrae.eval.dpg_bench.mplug import MPLUG, MPlug

        return MPlug(model or MPLUG, device, batch_size)
    if model is None or (name == "endpoint" and url is None):
        needed = "judge_url= and judge_model=" if name == "endpoint" else "judge_model="
        raise ValueError(f"judge={name} needs {needed}")
    if name == "endpoint":
        return EndpointVQA(str(url), model)
    if name == "vqa":
        return TransformersVQA(model, device, batch_size)
    return ChatVQA(name, model, YES_OR_NO if name == "chat" else None, device, batch_size)


def ask_what_is_known(judge: VQA) -> dict[str, Any]:
    """Answers about a plain red disc: a judge that does not tell red from blue should not be trusted."""
    from PIL import ImageDraw

    image = Image.new("RGB", (224, 224), (150, 150, 150))
    ImageDraw.Draw(image).ellipse((56, 56, 168, 168), fill=(230, 25, 25))
    expected = {"is there a red circle ?": "yes", "is there a blue circle ?": "no"}
    answers = judge.answer([(image, question) for question in expected])
    found = dict(zip(expected, answers, strict=True))
    return {
        "answers": found,
        "passed": all(answer.casefold().startswith(expected[q]) for q, answer in found.items()),
    }
