"""DPG-Bench's table of prompts and questions: one row per question, in the published format.

    item_id, text, keywords, proposition_id, dependency, category_broad, category_detailed, tuple, question_natural_language

`dependency` names the questions that must be answered with yes before this one counts: "0" for none, else "1" or "1,2".
`tuple` starts with the category: "attribute - color (car, red)".
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqrae.common.files import decode_text, write_text

COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)
NEEDED = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
SOURCE = "https://github.com/TencentQQGYLab/ELLA/blob/main/dpg_bench/dpg_bench.csv"


@dataclass(frozen=True)
class Question:
    """A question about an image; `parents` are the numbers of the questions that it depends on."""

    number: int
    text: str
    proposition: str
    parents: tuple[int, ...] = ()

    @property
    def category(self) -> str:
        """Such as `attribute - color`."""
        return self.proposition.split("(")[0].strip()

    @property
    def broad_category(self) -> str:
        """Such as `attribute`."""
        return self.category.split("-")[0].strip()


@dataclass(frozen=True)
class Item:
    """A prompt with its questions, in the order of the table; images are called after `id`."""

    id: str
    prompt: str
    questions: tuple[Question, ...]

    def ancestors(self) -> dict[int, set[int]]:
        """All questions that each one depends on, also indirectly; those that do not exist, and itself, left out."""
        parents = {question.number: set(question.parents) for question in self.questions}
        found: dict[int, set[int]] = {}
        for number in parents:
            reached, border = set[int](), parents[number] & parents.keys()
            while border:
                reached |= border
                border = (
                    set().union(*(parents[parent] for parent in border)) & parents.keys() - reached
                )
            found[number] = reached - {number}
        return found


def read_questions(path: str | Path, problems: list[str] | None = None) -> list[Item]:
    """Read the table. Empty rows, as spreadsheets leave them, are skipped.

    Args:
        problems: takes a line for each oddity: rows without a number (left out), questions that appear twice (the later one
            is taken, as by the published script), questions that depend on nothing there is (the dependency is left out),
            rows of an item that are apart from each other (put together).

    Raises:
        FileNotFoundError: when there is none, with where to get it.
        ValueError: when columns are missing, or no row is left.
    """
    path, problems = Path(path), problems if problems is not None else []
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: get DPG-Bench's table from {SOURCE}, or set questions=scenes"
        )
    reader = csv.DictReader(
        io.StringIO(decode_text(path.read_bytes(), path), newline=""), restval=""
    )
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{path} has no columns {', '.join(missing)}: expected those of DPG-Bench, see {SOURCE}"
        )
    items: dict[str, tuple[str, dict[int, Question]]] = {}
    last = ""
    for line, row in enumerate(reader, start=1):
        if not any(row[name].strip() for name in NEEDED):
            continue
        name = row["item_id"].strip()
        if name in items and name != last:
            problems.append(f"row {line}: item {name} again, after others")
        last = name
        try:
            question = _question(row)
        except ValueError as error:
            problems.append(f"row {line} is left out: {error}")
            continue
        questions = items.setdefault(name, (row["text"], {}))[1]
        if question.number in questions:
            problems.append(
                f"row {line}: question {question.number} of item {name} twice, the later one is taken"
            )
        questions[question.number] = question
    if not items:
        raise ValueError(
            f"{path} holds no questions: {problems[0] if problems else 'it has no rows below its header'}"
        )
    read = [
        Item(name, prompt, tuple(questions.values())) for name, (prompt, questions) in items.items()
    ]
    for item in read:
        numbers = {question.number for question in item.questions}
        for question in item.questions:
            if unknown := sorted({*question.parents} - numbers):
                problems.append(
                    f"item {item.id}: question {question.number} depends on {unknown}, which do not exist"
                )
            if question.number in question.parents:
                problems.append(f"item {item.id}: question {question.number} depends on itself")
    return read


def _question(row: dict[str, str]) -> Question:
    parents = [_whole_number(part) for part in row["dependency"].split(",")]
    proposition, text = row["tuple"].strip(), row["question_natural_language"].strip()
    return Question(
        _whole_number(row["proposition_id"]), text, proposition, tuple(filter(None, parents))
    )


def _whole_number(text: str) -> int:
    """A number of the table, also where a spreadsheet made 1.0 of it."""
    return int(text.strip().removesuffix(".0"))


def write_questions(path: str | Path, items: Sequence[Item]) -> None:
    """Write the table; keywords stay empty."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in items:
        for q in item.questions:
            detail = q.category.partition("-")[2].strip()
            parents = ",".join(map(str, q.parents)) or "0"
            writer.writerow(
                [
                    item.id,
                    item.prompt,
                    "",
                    q.number,
                    parents,
                    q.broad_category,
                    detail,
                    q.proposition,
                    q.text,
                ]
            )
    write_text(path, buffer.getvalue())
