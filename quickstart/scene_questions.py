"""How many questions about validation scenes a model answers right, beside what guessing without eyes would reach.

    python -m vqrae.quickstart.scene_questions model=runs/understanding num_images=500 output=questions.json

An answer counts when it equals the expected word after stripping white space and lowering case. Every second validation
scene holds a combination that training never shows; both halves are scored apart.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vqrae.common.cli import parse
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import write_json
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import Question
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.sharding import gather_strided, processes, progress_of_main, stride

Answer = Callable[[Sequence[tuple[Image.Image, str]]], list[str]]
"""(image, question) pairs -> answers in the same order."""

GUESSING_QUESTIONS = 20_000  # training questions that the blind guesser learns from
CHUNK = 256  # questions between two progress reports
EXAMPLES = 24


@dataclass(frozen=True)
class AskedQuestion:
    """A question about validation scene `index`, which is of a kind that training `held_out` or not."""

    index: int
    question: Question
    held_out: bool


def validation_questions(scenes: SceneDataset, num_images: int) -> list[AskedQuestion]:
    """All questions about the first `num_images` validation scenes, as many per scene as the data set says."""
    return [
        AskedQuestion(index, question, held_out=index % 2 == 1)
        for index in range(num_images)
        for question in scenes.questions(index)
    ]


class BlindGuesser:
    """The best predictor that sees only the question: the most frequent answer to it in training, else to its kind."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self._by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            self._by_text[question.text][question.answer] += 1
            self._by_kind[question.kind][question.answer] += 1

    @classmethod
    def from_training(
        cls, scenes: SceneDataset, num_questions: int = GUESSING_QUESTIONS
    ) -> "BlindGuesser":
        """Learn from the first questions of a training set."""
        questions: list[Question] = []
        index = 0
        while len(questions) < num_questions:
            questions += scenes.questions(index)
            index += 1
        return cls(questions[:num_questions])

    def answer(self, question: Question) -> str:
        """The guess; empty for a kind of question that training never asked."""
        answers = self._by_text.get(question.text) or self._by_kind.get(question.kind)
        return answers.most_common(1)[0][0] if answers else ""


def is_correct(answer: str, expected: str) -> bool:
    """Exact match, white space around it and case aside."""
    return answer.strip().lower() == expected.strip().lower()


def accuracies(asked: Sequence[AskedQuestion], answers: Sequence[str]) -> dict[str, Any]:
    """Share of right answers: `accuracy` over all, per kind in `kinds`, `held_out` and `seen` scenes apart."""
    correct = [
        is_correct(answer, item.question.answer)
        for item, answer in zip(asked, answers, strict=True)
    ]
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for item, right in zip(asked, correct, strict=True):
        groups[item.question.kind].append(right)
    halves = {
        name: [
            right for item, right in zip(asked, correct, strict=True) if item.held_out == held_out
        ]
        for name, held_out in (("held_out", True), ("seen", False))
    }
    return {
        "accuracy": sum(correct) / len(correct),
        "kinds": {kind: sum(group) / len(group) for kind, group in sorted(groups.items())},
        **{name: sum(group) / len(group) for name, group in halves.items() if group},
    }


def _flat(parts: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(parts))


def evaluate_questions(
    answer: Answer,
    *,
    sprites: str = "shapes",
    image_size: int = 64,
    num_images: int = 500,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask a model about validation scenes; several processes share the work, and all get the result.

    Args:
        answer: the model.
        seed: of the scenes, that of the training data.
        progress: called with (questions done, questions in all), of this process.

    Returns:
        What `accuracies` returns; `blind_accuracy` with `blind_kinds`, the same questions guessed from their text alone;
        `no_image_accuracy`, the model before a mid-grey image; num_questions, num_images; the first `examples`.
    """
    scenes = SceneDataset(
        "validation", num_images, image_size=image_size, sprites=sprites, seed=seed
    )
    training = SceneDataset("train", image_size=image_size, sprites=sprites, seed=seed)
    asked = validation_questions(scenes, num_images)
    grey = Image.new("RGB", (image_size, image_size), (128, 128, 128))
    texts = sorted(
        {item.question.text for item in asked}
    )  # before a grey image, equal questions have equal answers

    def before_scenes(chunk: Sequence[AskedQuestion]) -> list[tuple[Image.Image, str]]:
        images = {item.index: Image.fromarray(scenes.pixels(item.index)) for item in chunk}
        return [(images[item.index], item.question.text) for item in chunk]

    # Whole chunks are shared out, so that a model's batches do not depend on the number of processes.
    chunks = [asked[start : start + CHUNK] for start in range(0, len(asked), CHUNK)]
    blind_chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    mine, mine_blind = stride(chunks), stride(blind_chunks)
    total, done = sum(map(len, mine)) + sum(map(len, mine_blind)), 0

    def ask(pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        nonlocal done
        answers = answer(pairs)
        if len(answers) != len(pairs):
            raise ValueError(
                f"got {len(answers)} answers to {len(pairs)} questions, expected as many"
            )
        done += len(pairs)
        if progress is not None:
            progress(done, total)
        return answers

    answers = _flat(gather_strided([ask(before_scenes(chunk)) for chunk in mine]))
    blind_answers = [ask(list(zip(itertools.repeat(grey), chunk))) for chunk in mine_blind]
    unseen = dict(zip(texts, _flat(gather_strided(blind_answers)), strict=True))

    guesser = BlindGuesser.from_training(training)
    blind = accuracies(asked, [guesser.answer(item.question) for item in asked])
    examples = [
        {
            "index": a.index,
            "question": a.question.text,
            "expected": a.question.answer,
            "answer": given.strip(),
        }
        for a, given in zip(asked[:EXAMPLES], answers[:EXAMPLES], strict=True)
    ]
    return {
        **accuracies(asked, answers),
        "blind_accuracy": blind["accuracy"],
        "blind_kinds": blind["kinds"],
        "no_image_accuracy": accuracies(asked, [unseen[item.question.text] for item in asked])[
            "accuracy"
        ],
        "num_questions": len(asked),
        "num_images": num_images,
        "examples": examples,
    }


@dataclass(frozen=True, kw_only=True)
class SceneQuestionsConfig:
    """Score an understanding model on questions about validation scenes, with the image and without."""

    model: str
    """Understanding model: run directory, model folder or hub id."""
    output: str
    """JSON file of the scores."""
    num_images: int = 500
    """Scenes to ask about; each gets up to five questions."""
    sprites: str = "shapes"
    """What the scenes are made of: shapes or emoji."""
    image_size: int = 64
    """Pixels of a scene's side; the model's processor scales them."""
    seed: int = 0
    """Of the scenes; that of the training data."""
    batch_size: int = 64
    """Questions of one pass."""
    max_new_tokens: int = 8
    """Longest answer; expected ones are one word."""
    tokenizer: str | None = None
    """Of a model that was trained on quantized features; others do not need it."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        load_sprites(self.sprites)
        if min(self.num_images, self.batch_size, self.max_new_tokens) < 1:
            raise ValueError("num_images, batch_size and max_new_tokens must be positive")


def main(argv: list[str] | None = None) -> None:
    config = parse(SceneQuestionsConfig, argv)
    from vqrae.understanding.chat import (
        Chat,  # the language model's imports take seconds; `--help` does without
    )

    with processes(config.device) as device:
        chat = Chat.from_pretrained(
            config.model,
            device=device,
            max_new_tokens=config.max_new_tokens,
            tokenizer=config.tokenizer,
        )
        result = evaluate_questions(
            lambda pairs: chat.answer(pairs, batch_size=config.batch_size),
            sprites=config.sprites,
            image_size=config.image_size,
            num_images=config.num_images,
            seed=config.seed,
            progress=progress_of_main("questions"),
        )
    if not is_main_process():
        return
    write_json(config.output, result)
    kinds = "  ".join(f"{kind} {value:.1%}" for kind, value in result["kinds"].items())
    print(
        f"accuracy {result['accuracy']:.1%} ({kinds})\nblind {result['blind_accuracy']:.1%}  "
        f"no image {result['no_image_accuracy']:.1%}  {result['num_questions']} questions  ->  {config.output}"
    )


if __name__ == "__main__":
    run_main(main)
