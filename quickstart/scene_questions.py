"""How many questions about validation scenes a model answers right, vs guessing from the question.

    python -m vqrae.quickstart.scene_questions model=runs/understanding output=questions.json

An answer counts when it equals the expected word without white space around it, in any case. Every
second validation scene holds a combination that training never shows; both halves are scored apart.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from vqrae.common.checkpoints import model_fingerprint
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.run import kept
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import Question
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.sharding import batch_indices, gather, processes, progress_of_main

# (image, question) pairs -> answers in the same order
Answer = Callable[[Sequence[tuple[Image.Image, str]]], list[str]]

GUESSING_QUESTIONS = 20_000  # training questions that the blind guesser learns from
CHUNK = 256  # questions between two progress reports
EXAMPLES = 24


@dataclass(frozen=True, kw_only=True)
class SceneQuestionsConfig:
    """Score an understanding model on questions about scenes, with and without the image."""

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
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        load_sprites(self.sprites)
        check_range(self, "num_images", "batch_size", "max_new_tokens", low=1)


@dataclass(frozen=True)
class AskedQuestion:
    """A question about validation scene `index`; `held_out` if training shows no such scene."""

    index: int
    question: Question
    held_out: bool


def validation_questions(scenes: SceneDataset, num_images: int) -> list[AskedQuestion]:
    """All questions about the first `num_images` validation scenes."""
    asked = []
    for index in range(num_images):
        held_out = index % 2 == 1
        asked += [AskedQuestion(index, q, held_out) for q in scenes.questions(index)]
    return asked


class BlindGuesser:
    """The best guess from the question alone: its most frequent answer, else that of its kind."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self._by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            self._by_text[question.text][question.answer] += 1
            self._by_kind[question.kind][question.answer] += 1

    def answer(self, question: Question) -> str:
        """The guess; empty for a kind of question that training never asked."""
        answers = self._by_text.get(question.text) or self._by_kind.get(question.kind)
        return answers.most_common(1)[0][0] if answers else ""


def is_correct(answer: str, expected: str) -> bool:
    """Whether both are the same words."""
    return answer.strip().lower() == expected.strip().lower()


def accuracies(asked: Sequence[AskedQuestion], answers: Sequence[str]) -> dict[str, Any]:
    """Shares of right answers: `accuracy` of all, `kinds`, and `held_out` and `seen` scenes."""
    correct: list[bool] = []
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    halves: dict[str, list[bool]] = {"held_out": [], "seen": []}
    for item, answer in zip(asked, answers, strict=True):
        right = is_correct(answer, item.question.answer)
        correct.append(right)
        kinds[item.question.kind].append(right)
        halves["held_out" if item.held_out else "seen"].append(right)
    shares: dict[str, Any] = {half: mean(found) for half, found in halves.items() if found}
    by_kind = {kind: mean(kinds[kind]) for kind in sorted(kinds)}
    return {"accuracy": mean(correct), "kinds": by_kind, **shares}


def mean(values: Sequence[bool]) -> float:
    """Share of true values."""
    return sum(values) / len(values)


def ask(
    answer: Answer,
    scenes: SceneDataset,
    questions: Sequence[tuple[int | None, str]],
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Answers to (scene, or None for a grey image; text). The launch's processes share the work."""
    size = scenes.sampler.image_size
    grey = Image.new("RGB", (size, size), (128, 128, 128))
    chunks = [questions[b[0] : b[-1] + 1] for b in batch_indices(len(questions), CHUNK)]
    total = sum(len(chunk) for chunk in chunks)
    done = 0
    answers = []
    for chunk in chunks:
        indices = {index for index, _ in chunk if index is not None}
        images = {index: Image.fromarray(scenes.pixels(index)) for index in indices}
        pairs = [(grey if index is None else images[index], text) for index, text in chunk]
        answers.append(answer(pairs))
        done += len(pairs)
        if progress is not None:
            progress(done, total)
    return list(itertools.chain(*gather(answers)))


def evaluate_questions(
    answer: Answer,
    *,
    sprites: str = "shapes",
    image_size: int = 64,
    num_images: int = 500,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask a model about validation scenes.

    Args:
        answer: the model.
        seed: of the scenes, that of the training data.
        progress: called with (questions done, questions in all), of this process.

    Returns:
        What `accuracies` returns; `blind_accuracy` with `blind_kinds`, the same questions guessed
        from their text alone; `no_image_accuracy`, the model with a mid-grey image; num_questions,
        num_images; the first `examples`.
    """
    options: dict[str, Any] = {"image_size": image_size, "sprites": sprites, "seed": seed}
    scenes = SceneDataset("validation", num_images, **options)
    asked = validation_questions(scenes, num_images)
    # With a grey image, equal questions have equal answers.
    texts = sorted({item.question.text for item in asked})
    answers = ask(answer, scenes, [(item.index, item.question.text) for item in asked], progress)
    grey_answers = ask(answer, scenes, [(None, text) for text in texts], progress)
    unseeing = dict(zip(texts, grey_answers, strict=True))

    training = SceneDataset("train", **options)
    learned: list[Question] = []
    for index in itertools.count():
        learned += training.questions(index)
        if len(learned) >= GUESSING_QUESTIONS:
            break
    guesser = BlindGuesser(learned[:GUESSING_QUESTIONS])
    blind = accuracies(asked, [guesser.answer(item.question) for item in asked])
    no_image = accuracies(asked, [unseeing[item.question.text] for item in asked])
    examples = [
        {
            "index": item.index,
            "question": item.question.text,
            "expected": item.question.answer,
            "answer": given.strip(),
        }
        for item, given in zip(asked[:EXAMPLES], answers[:EXAMPLES], strict=True)
    ]
    return {
        **accuracies(asked, answers),
        "blind_accuracy": blind["accuracy"],
        "blind_kinds": blind["kinds"],
        "no_image_accuracy": no_image["accuracy"],
        "num_questions": len(asked),
        "num_images": num_images,
        "examples": examples,
    }


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(SceneQuestionsConfig, argv)
    # The language model's imports take seconds; `--help` does without.
    from vqrae.mllm.inference import open_chat

    def score() -> dict[str, Any]:
        chat = open_chat(config.model, device=device, max_new_tokens=config.max_new_tokens)
        return evaluate_questions(
            lambda pairs: chat.answer(pairs, batch_size=config.batch_size),
            sprites=config.sprites,
            image_size=config.image_size,
            num_images=config.num_images,
            seed=config.seed,
            progress=progress_of_main("questions"),
        )

    settings = asdict(config) | {"model": model_fingerprint(config.model)}
    for name in ("output", "device", "batch_size"):  # decide no score
        del settings[name]
    with processes(config.device) as device:
        result = kept(config.output, settings, score)
    if is_main_process():
        kinds = "  ".join(f"{kind} {value:.1%}" for kind, value in result["kinds"].items())
        print(
            f"accuracy {result['accuracy']:.1%} ({kinds})\n"
            f"blind {result['blind_accuracy']:.1%}  no image {result['no_image_accuracy']:.1%}  "
            f"{result['num_questions']} questions  ->  {config.output}"
        )


if __name__ == "__main__":
    run_main(main)
