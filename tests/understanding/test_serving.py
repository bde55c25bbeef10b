"""`transformers serve` answers about images as `vqrae chat` does: streamed, whole, in turns."""

import base64
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.understanding.chat import Chat

QUESTION = "what color is the circle ?"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason='needs pip install "transformers[serving]"'
    ),
]


@pytest.fixture(scope="module")
def server(llava: Path) -> Iterator[str]:
    """The address of chat completions."""
    from transformers.cli.serve import Serve

    # Port 0: the system chooses, so that no other process takes it in between.
    serve = Serve(str(llava), device="cpu", host="127.0.0.1", port=0, non_blocking=True)
    try:
        while not serve.server.started:
            assert serve._thread.is_alive(), "the server ended before it listened"
            time.sleep(0.1)
        port = serve.server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        serve.kill_server()


@pytest.fixture(scope="module")
def chat(llava: Path) -> Chat:
    return Chat.from_pretrained(llava, max_new_tokens=6)


def _post(server: str, messages: list[dict[str, Any]], **options: Any) -> str:
    body = {"messages": messages, "temperature": 0, "max_tokens": 6, **options}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(server, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def _user(text: str, *images: Path) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for image in images:
        url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two scenes, one of them in another shape and with transparency."""
    scenes = SceneDataset(item="conversation")
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    scenes[0]["image"].save(paths[0])
    scenes[1]["image"].resize((150, 90)).convert("RGBA").save(paths[1])
    return paths


@pytest.fixture
def asked(images: list[Path]) -> list[tuple[list[Path], str]]:
    return [([images[0]], QUESTION), ([images[1]], QUESTION), (images, "what ?"), ([], "what ?")]


def test_answers_equal_those_of_chat(
    server: str, chat: Chat, asked: list[tuple[list[Path], str]]
) -> None:
    answers = []
    for paths, question in asked:
        answer = json.loads(_post(server, [_user(question, *paths)]))
        answers.append(answer["choices"][0]["message"]["content"].strip())
    assert answers == chat.answer(asked)
    assert len(set(answers)) > 2  # the images are looked at


def test_streaming_gives_the_same_words_piece_by_piece(
    server: str, chat: Chat, asked: list[tuple[list[Path], str]]
) -> None:
    answers, most = [], 0
    for paths, question in asked:
        lines = _post(server, [_user(question, *paths)], stream=True).splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
        most = max(most, sum(map(bool, pieces)))
        answers.append("".join(pieces).strip())
    assert answers == chat.answer(asked)
    assert most > 1


def test_a_conversation_goes_on(server: str, chat: Chat, images: list[Path]) -> None:
    session = chat.session()
    turns = [_user(QUESTION, images[0])]
    turns.append({"role": "assistant", "content": session.ask(QUESTION, images[0])})
    turns.append(_user("where is it ?"))
    answer = json.loads(_post(server, turns))["choices"][0]["message"]["content"]
    assert answer.strip() == session.ask("where is it ?")
