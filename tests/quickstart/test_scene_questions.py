"""Questions about scenes: scoring, the blind guesser, the grey image."""

import json
from pathlib import Path

import numpy as np

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import Question
from vqrae.quickstart import scene_questions
from vqrae.quickstart.scene_questions import (
    BlindGuesser,
    evaluate_questions,
    is_correct,
    validation_questions,
)


def test_exact_match_aside_from_case_and_space() -> None:
    assert is_correct(" Red\n", "red")
    assert not is_correct("red.", "red")
    assert not is_correct("", "red")


def test_guesser_prefers_the_question_to_its_kind() -> None:
    questions = [Question("color", "color of a ?", answer) for answer in ("red", "blue", "blue")]
    questions += [Question("color", "color of b ?", "red")] * 3
    guesser = BlindGuesser(questions)
    assert guesser.answer(Question("color", "color of a ?", "")) == "blue"
    assert guesser.answer(Question("color", "color of c ?", "")) == "red"
    assert guesser.answer(Question("shape", "what ?", "")) == ""


def oracle(scenes: SceneDataset, num_images: int):
    """A model that knows the answers by heart, as long as it sees the image."""
    known = {
        (scenes.pixels(item.index).tobytes(), item.question.text): item.question.answer
        for item in validation_questions(scenes, num_images)
    }
    return lambda pairs: [
        known.get((np.asarray(image).tobytes(), text), "yes") for image, text in pairs
    ]


def test_seeing_beats_guessing() -> None:
    scenes = SceneDataset("validation", 40)
    calls: list[tuple[int, int]] = []
    result = evaluate_questions(
        oracle(scenes, 40), num_images=40, progress=lambda *call: calls.append(call)
    )
    assert result["accuracy"] == result["held_out"] == result["seen"] == 1
    assert set(result["kinds"]) == {"shape", "color", "count", "relation", "yes_no"}
    assert set(result["kinds"].values()) == {1}
    assert 0 < result["blind_accuracy"] < 0.4
    assert 0 < result["no_image_accuracy"] < 0.4  # "yes" to everything
    assert result["num_images"] == 40
    assert result["examples"][0]["answer"] == result["examples"][0]["expected"]
    assert calls[-1][0] == calls[-1][1]


def test_command_with_a_random_model(llava: Path, tmp_path: Path) -> None:
    output = tmp_path / "questions.json"
    few = ["num_images=2", "max_new_tokens=2"]
    scene_questions.main([f"model={llava}", *few, f"output={output}"])
    values = json.loads(output.read_text())
    assert 0 <= values["accuracy"] <= 1
    assert {"blind_accuracy", "no_image_accuracy", "kinds", "held_out", "seen", "examples"} <= set(
        values
    )
