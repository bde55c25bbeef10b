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
    """A question about a picture; `parents` are the numbers of the questions that it depends on."""

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
    """A prompt with its questions, in the order of the table; pictures are called after `id`."""

    id: str
    prompt: str
    questions: tuple[Question, ...]

    def ancestors(self) -> dict[int, set[int]]:
        """All questions that each one depends on, also indirectly.

        Raises:
            ValueError: when a question depends on one that does not exist, or on itself.
        """
        parents = {question.number: set(question.parents) for question in self.questions}
        unknown = sorted(set().union(*parents.values()) - parents.keys())
        if unknown:
            raise ValueError(f"item {self.id}: questions depend on {unknown}, which do not exist")
        found: dict[int, set[int]] = {}
        for number in parents:
            reached, border = set[int](), set(parents[number])
            while border:
                reached |= border
                border = set().union(*(parents[parent] for parent in border)) - reached
            if number in reached:
                raise ValueError(f"item {self.id}: question {number} depends on itself")
            found[number] = reached
        return found


def read_questions(path: str | Path) -> list[Item]:
    """Read the table.

    Raises:
        FileNotFoundError: when there is none, with where to get it.
        ValueError: listing what is wrong with it: missing columns, numbers that are none, questions that appear twice or
            depend on nothing there is, rows of an item that do not stand together.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: get DPG-Bench's table from {SOURCE}, or set questions=scenes")
    reader = csv.DictReader(io.StringIO(decode_text(path.read_bytes(), path), newline=""))
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} has no columns {', '.join(missing)}: expected those of DPG-Bench, see {SOURCE}")
    rows = list(reader)
    items: dict[str, tuple[str, list[Question]]] = {}
    problems, last = [], ""
    for line, row in enumerate(rows, start=1):
        name = row["item_id"].strip()
        if name in items and name != last:
            problems.append(f"row {line}: item {name} again, after others")
        last = name
        try:
            number = int(row["proposition_id"])
            parents = tuple(parent for part in row["dependency"].split(",") if (parent := int(part)) != 0)
        except ValueError as error:
            problems.append(f"row {line}: {error}")
            continue
        questions = items.setdefault(name, (row["text"], []))[1]
        if any(question.number == number for question in questions):
            problems.append(f"row {line}: question {number} of item {name} twice")
        questions.append(Question(number, row["question_natural_language"].strip(), row["tuple"].strip(), parents))
    read = [Item(name, prompt, tuple(questions)) for name, (prompt, questions) in items.items()]
    for item in read:
        try:
            item.ancestors()
        except ValueError as error:
            problems.append(str(error))
    if problems or not read:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"{path}: {len(rows)} rows, {len(problems)} problems\n  {shown}")
    return read


def write_questions(path: str | Path, items: Sequence[Item]) -> None:
    """Write the table; keywords stay empty."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in items:
        for q in item.questions:
            detail = q.category.partition("-")[2].strip()
            parents = ",".join(map(str, q.parents)) or "0"
            writer.writerow([item.id, item.prompt, "", q.number, parents, q.broad_category, detail, q.proposition, q.text])
    write_text(path, buffer.getvalue())
