"""Answers do not depend on the batch, pictures come in any form, sessions remember."""

import pytest
import torch
from PIL import Image

from vqrae.data.scenes import SceneDataset
from vqrae.understanding.build import build_llava
from vqrae.understanding.chat import Chat


@pytest.fixture(scope="module")
def chat(tokenizer_folder, llm_folder, tmp_path_factory) -> Chat:
    """A random model that looks at its picture: large weights, and no end token, so that it talks on."""
    torch.manual_seed(0)
    model, processor = build_llava(tokenizer_folder, llm_folder)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(4)
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("chat") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Chat.from_pretrained(folder.parent, max_new_tokens=6)


def _conversations():
    scenes = SceneDataset(item="conversation")
    pictures = [scenes[i]["image"] for i in range(3)]
    return [
        (pictures[0], "what color is the circle ?"),
        (None, "how many things are there ?"),
        (pictures[1], "is there a red star left of the blue heart ?"),
        ([pictures[1], pictures[2]], "what ?"),
        (pictures[2].resize((150, 90)), "what color is the circle ?"),
    ]


def test_batch_of_one_equals_batch_of_many(chat):
    many = chat.answer(_conversations())
    assert many == chat.answer(_conversations(), batch_size=1) == chat.answer(_conversations(), batch_size=2)
    assert len(set(many)) > 1
    assert all(many)


def test_picture_changes_the_next_token(chat):
    white, scene = Image.new("RGB", (64, 64), "white"), SceneDataset(item="conversation")[0]["image"]
    assert chat.answer([(white, "what ?")]) != chat.answer([(scene, "what ?")])


def test_paths_and_modes_are_opened(chat, tmp_path):
    picture = SceneDataset(item="conversation")[0]["image"]
    picture.save(tmp_path / "scene.png")
    forms = [picture, tmp_path / "scene.png", str(tmp_path / "scene.png"), picture.convert("RGBA"), [picture]]
    assert len(set(chat.answer([(form, "what ?") for form in forms]))) == 1
    with pytest.raises(ValueError, match="no such file"):
        chat.answer([(tmp_path / "missing.png", "what ?")])


def test_image_tag_in_a_question_is_refused(chat):
    with pytest.raises(ValueError, match="pass pictures beside it"):
        chat.answer([(None, "<image> what ?")])


def test_session_remembers_and_survives_errors(chat):
    picture = SceneDataset(item="conversation")[0]["image"]
    session = chat.session()
    first = session.ask("what ?", picture)
    assert [first] == chat.answer([(picture, "what ?")])
    with pytest.raises(ValueError, match="no such file"):
        session.ask("and this ?", "missing.png")
    second = session.ask("where is it ?")
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    asked = [*session.messages[:3]]
    assert [second] == chat.generate([asked])
