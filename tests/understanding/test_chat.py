"""Answers are those of one by one, images come in any form, files of questions resume."""

import json
import os

import pytest
import torch
from PIL import Image
from processes import locked
from safetensors.torch import load_file, save_file
from tokenizers import processors

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.understanding.build import build_llava
from vqrae.understanding.chat import Chat, answer_file


@pytest.fixture(scope="module")
def chat(llava) -> Chat:
    return Chat.from_pretrained(llava, max_new_tokens=6)


def _conversations():
    scenes = SceneDataset(item="conversation")
    images = [scenes[i]["image"] for i in range(3)]
    return [
        (images[0], "what color is the circle ?"),
        (None, "how many things are there ?"),
        (images[1], "is there a red star left of the blue heart ?"),
        ([images[1], images[2]], "what ?"),
        (images[2].resize((150, 90)), "what color is the circle ?"),
    ]


def test_batch_of_one_equals_batch_of_many(chat):
    many = chat.answer(_conversations())
    for batch_size in (1, 2):
        assert chat.answer(_conversations(), batch_size=batch_size) == many
    assert len(set(many)) > 1
    assert all(many)


def test_image_changes_the_next_token(chat):
    scene = SceneDataset(item="conversation")[0]["image"]
    white = Image.new("RGB", (64, 64), "white")
    assert chat.answer([(white, "what ?")]) != chat.answer([(scene, "what ?")])


def test_paths_and_modes_are_opened(chat, tmp_path):
    image = SceneDataset(item="conversation")[0]["image"]
    image.save(tmp_path / "scene.png")
    file = tmp_path / "scene.png"
    forms = [image, file, str(file), image.convert("RGBA"), [image]]
    assert len(set(chat.answer([(form, "what ?") for form in forms]))) == 1
    with pytest.raises(ValueError, match="no such file"):
        chat.answer([(tmp_path / "missing.png", "what ?")])


def test_image_tag_in_a_question_is_refused(chat):
    with pytest.raises(ValueError, match="pass images apart from it"):
        chat.answer([(None, "<image> what ?")])


def test_session_remembers_and_survives_errors(chat):
    image = SceneDataset(item="conversation")[0]["image"]
    session = chat.session()
    first = session.ask("what ?", image)
    assert [first] == chat.answer([(image, "what ?")])
    with pytest.raises(ValueError, match="no such file"):
        session.ask("and this ?", "missing.png")
    second = session.ask("where is it ?")
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    asked = [*session.messages[:3]]
    assert [second] == chat.generate([asked])


def test_models_that_cannot_answer_are_refused(chat, tokenizer_folder, llm_folder, tmp_path):
    for folder, kind in ((tokenizer_folder, "vqrae"), (llm_folder, "qwen3")):
        with pytest.raises(ValueError, match=f"is a '{kind}' model, expected an understanding"):
            Chat.from_pretrained(folder)
    model, processor = build_llava(tokenizer_folder, llm_folder)
    torch.nn.init.constant_(model.model.multi_modal_projector.linear_1.bias, torch.nan)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"linear_1.bias holds values that are not finite"):
        Chat.from_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of .*multi_modal_projector.linear_1.bias"):
        Chat.from_pretrained(tmp_path)


# ---- a file of questions


@pytest.fixture
def questions(tmp_path):
    """Seven questions in both formats, one of them about a file that is not an image."""
    images = [image for image, _ in _conversations() if isinstance(image, Image.Image)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    records = [
        {"id": 7, "image": "0.png", "question": "what color is the circle ?"},
        {"question": "how many things are there ?"},
        {"question_id": 1, "image": "1.png", "text": "is there a red star ?"},
        {"image": "broken.png", "question": "what ?"},
        {"image": ["1.png", "2.png"], "question": "what ?"},
        {"image": "2.png", "question": "what color is the circle ?"},
        {"image": "0.png", "question": "what ?"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    return file


def _rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_questions_is_answered_alike_in_batches_and_one_by_one(chat, questions, tmp_path):
    calls, out = [], tmp_path / "a.jsonl"
    options = {"fingerprint": "f", "progress": lambda *call: calls.append(call)}
    done = answer_file(chat, questions, out, **options)
    assert (done.total, done.resumed, done.failed, calls) == (7, 0, 1, [(7, 7)])
    answer_file(chat, questions, tmp_path / "b.jsonl", fingerprint="f", batch_size=1)
    rows = _rows(tmp_path / "a.jsonl")
    assert rows == _rows(tmp_path / "b.jsonl")
    assert rows[0]["id"] == 7
    assert "broken.png: not a readable image" in rows[3]["error"]
    image = Image.open(tmp_path / "1.png")
    assert [rows[2]["answer"]] == chat.answer([(image, rows[2]["text"])])


def test_answers_resume_where_they_end(chat, questions, tmp_path):
    out = tmp_path / "a.jsonl"
    answer_file(chat, questions, out, fingerprint="f")
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:10])
    assert answer_file(chat, questions, out, fingerprint="f").resumed == 3
    assert out.read_text() == whole
    with pytest.raises(ValueError, match="holds answers made with"):
        answer_file(chat, questions, out, fingerprint="another model")
    questions.write_text('{"question": "another ?"}\n')
    with pytest.raises(ValueError, match=r"line 1 answers .* but the question is"):
        answer_file(chat, questions, out, fingerprint="f")


def test_an_image_that_is_none_costs_its_own_answer(chat, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    images = [5, ["a.png", 5], {"a": 1}, "pipe.png", "\0.png", "none.png"]
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question": "what ?", "image": image}) + "\n" for image in images)
    )
    done = answer_file(chat, tmp_path / "q.jsonl", tmp_path / "a.jsonl", fingerprint="f")
    assert (done.total, done.failed) == (6, 6)
    assert all(row["error"] for row in _rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("line", ["{", "[]", '{"image": "a.png"}'])
def test_a_line_that_is_no_question_is_named(chat, line, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "what ?"}\n' + line)
    with pytest.raises(ValueError, match=r"q.jsonl, line 2: (got|not valid JSON)"):
        answer_file(chat, tmp_path / "q.jsonl", tmp_path / "a.jsonl", fingerprint="f")


def test_answers_belong_to_their_images_and_keep_what_a_line_holds(chat, questions, tmp_path):
    out, other = tmp_path / "a.jsonl", tmp_path / "other"
    records = [
        {"question": "what ?", "image": "0.png", "answer": "a star", "error": "none"},
        {"question": "x", "image": "no"},
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert answer_file(chat, questions, out, fingerprint="f").failed == 1
    rows = _rows(out)
    assert rows[0] == {**records[0], "prediction": rows[0]["prediction"]}
    assert rows[0]["prediction"] == chat.answer([(tmp_path / "0.png", "what ?")])[0]
    assert "no such file" in rows[1]["error"]
    assert answer_file(chat, questions, out, fingerprint="f").resumed == 2
    other.mkdir()
    with pytest.raises(ValueError, match=f"image_folder.*{other}"):
        answer_file(chat, questions, out, fingerprint="f", image_folder=other)


def test_two_processes_on_one_file_of_answers_are_noticed(chat, questions, tmp_path):
    out = tmp_path / "a.jsonl"
    with locked(tmp_path / ".a.jsonl.lock") as said, pytest.raises(ValueError, match=said):
        answer_file(chat, questions, out, fingerprint="f")
    assert answer_file(chat, questions, out, fingerprint="f").total == 7


def test_a_question_beyond_the_positions_costs_its_own_answer_only(chat, questions, tmp_path):
    positions = chat.model.config.get_text_config().max_position_embeddings
    long = "star " * (positions + 1)
    with pytest.raises(
        ValueError, match=f"expected fewer than the {positions:,} positions of the model"
    ):
        chat.answer([(None, long)])
    questions.write_text(
        "".join(json.dumps({"question": text}) + "\n" for text in ("what ?", long, "how many ?"))
    )
    assert answer_file(chat, questions, tmp_path / "a.jsonl", fingerprint="f").failed == 1
    assert ["answer" in row for row in _rows(tmp_path / "a.jsonl")] == [True, False, True]


def test_control_tokens_that_a_user_types_are_text(chat, monkeypatch):
    received = []
    monkeypatch.setattr(
        chat.model, "generate", lambda input_ids, **options: received.append(input_ids) or input_ids
    )
    chat.answer([(None, "red <|im_end|> star"), (None, "what ?")])
    ids, plain = received[0]
    end = chat.text_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int((ids == end).sum()) == int((plain == end).sum()) == 1  # the template's own
    chat.answer([(None, "what ?")])
    assert received[1][0].tolist() == plain[plain != chat.text_tokenizer.pad_token_id].tolist()

    backend = chat.text_tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", end)]
    )
    try:
        with pytest.raises(ValueError, match="spells control tokens, expected none for this model"):
            chat.answer([(None, "red <|im_end|> star")])
    finally:
        backend.post_processor = None
