"""DPG-Bench's table of prompts and questions: one row per question, in the published format.

`dependency` names the questions that must be answered with yes before this one counts: "0" for
none, else "1" or "1,2". `tuple` starts with the category: "attribute - color (car, red)"."""

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
class DPGQuestion:
    """A question about an image; `parents` are the numbers of the questions that it depends on."""

    number: int
    text: str
    proposition: str
    parents: tuple[int, ...] = ()

    @property
    def category(self) -> str:
        """Such as `attribute - color`; what precedes the dash is the broad category."""
        return self.proposition.split("(")[0].strip()


@dataclass(frozen=True)
class DPGItem:
    """A prompt with its questions, in the order of the table; image files are named after `id`."""

    id: str
    prompt: str
    questions: tuple[DPGQuestion, ...]


def broad(category: str) -> str:
    """`attribute` of `attribute - color`."""
    return category.split("-")[0].strip()


def read_questions(path: str | Path) -> tuple[list[DPGItem], list[str]]:
    """The items of the table, and a line for each oddity; empty rows are skipped.

    Oddities: rows without a number (left out), questions that appear twice (the later one is taken,
    as by the published script), dependencies on questions that do not exist (left out).

    Raises FileNotFoundError when there is no table, with where to get it; ValueError when columns
    are missing, or no row is left.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: get DPG-Bench's table from {SOURCE}, or set questions=scenes"
        )
    text = io.StringIO(decode_text(path.read_bytes(), path), newline="")
    reader = csv.DictReader(text, restval="")
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{path} has no columns {', '.join(missing)}: expected those of DPG-Bench, see {SOURCE}"
        )
    problems: list[str] = []
    prompts: dict[str, str] = {}
    table: dict[str, dict[int, DPGQuestion]] = {}  # item -> number -> question
    for line, row in enumerate(reader, start=1):
        if not any(row[name].strip() for name in NEEDED):
            continue
        name = row["item_id"].strip()
        try:
            question = _question(row)
        except ValueError as error:
            problems.append(f"row {line} is left out: {error}")
            continue
        prompts.setdefault(name, row["text"])
        questions = table.setdefault(name, {})
        if question.number in questions:
            twice = f"question {question.number} of item {name} twice"
            problems.append(f"row {line}: {twice}, the later one is taken")
        questions[question.number] = question
    if not table:
        reason = problems[0] if problems else "it has no rows below its header"
        raise ValueError(f"{path} holds no questions: {reason}")
    for name, questions in table.items():
        for number, question in questions.items():
            if unknown := sorted(set(question.parents) - questions.keys()):
                which = f"question {number} depends on {unknown}"
                problems.append(f"item {name}: {which}, which do not exist")
    items = [DPGItem(name, prompts[name], tuple(found.values())) for name, found in table.items()]
    return items, problems


def _question(row: dict[str, str]) -> DPGQuestion:
    # Spreadsheets make 1.0 of 1.
    numbers = [int(part.strip().removesuffix(".0")) for part in row["dependency"].split(",")]
    number = int(row["proposition_id"].strip().removesuffix(".0"))
    parents = tuple(parent for parent in numbers if parent)
    text, proposition = row["question_natural_language"].strip(), row["tuple"].strip()
    return DPGQuestion(number, text, proposition, parents)


def write_questions(path: str | Path, items: Sequence[DPGItem]) -> None:
    """Write the table; keywords stay empty."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in items:
        for q in item.questions:
            detail = q.category.partition("-")[2].strip()
            parents = ",".join(map(str, q.parents)) or "0"
            categories = (broad(q.category), detail)
            row = (item.id, item.prompt, "", q.number, parents, *categories, q.proposition, q.text)
            writer.writerow(row)
    write_text(path, buffer.getvalue())
