"""GenEval 2's prompt file: one JSON object per line, with the questions of its atoms.

    {"prompt": "two red cups", "atom_count": 3, "vqa_list": [["How many cups …?", "two"], …],
     "skills": ["count", …]}

The published file is CC BY-NC: it is not part of this package, users bring their own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.files import json_lines, write_text

SOURCE = "https://github.com/facebookresearch/GenEval2"
SKILLS = ("object", "attribute", "count", "position", "verb")
YES = ("Yes", "yes", " yes", " Yes")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS, start=1)}


@dataclass(frozen=True)
class Atom:
    """One thing that a prompt asks for, as a question; `answer` is Yes, or a number word."""

    question: str
    answer: str
    skill: str

    @property
    def ways(self) -> tuple[str, ...]:
        """What the answer may begin with, by the published script."""
        if self.answer == "Yes":
            return YES
        digit = DIGITS[self.answer]
        words = (self.answer, self.answer.capitalize())
        return (*words, *(f" {word}" for word in words), digit, f" {digit}")


@dataclass(frozen=True)
class GenEval2Item:
    """A prompt and its atoms; `atom_count` leaves out those that only check that "a" is one."""

    id: str
    prompt: str
    atom_count: int
    atoms: tuple[Atom, ...]


def read_prompts(path: str | Path) -> list[GenEval2Item]:
    """The prompts of a file, in order, numbered from `00000`.

    Raises FileNotFoundError when there is none, with where to get it; ValueError, naming the line,
    for what is not a prompt, and for one that comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: get geneval2_data.jsonl from {SOURCE} (CC BY-NC 4.0), or set "
            "prompts=scenes"
        )
    items: list[GenEval2Item] = []
    lines: dict[str, int] = {}
    for line, value in json_lines(path):
        try:
            item = _item(f"{len(items):05d}", value)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path}, line {line} is not a prompt of GenEval 2: {reason}; see {SOURCE}"
            ) from None
        if item.prompt in lines:
            raise ValueError(
                f"{path}, line {line}: the prompt of line {lines[item.prompt]} again, expected "
                "each once: images are found by their prompts"
            )
        lines[item.prompt] = line
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no prompts: expected GenEval 2's file, see {SOURCE}")
    return items


def _item(identity: str, value: dict[str, Any]) -> GenEval2Item:
    atoms = []
    for (question, answer), skill in zip(value["vqa_list"], value["skills"], strict=True):
        is_number = question.startswith("How many")
        if answer not in (DIGITS if is_number else ("Yes",)):
            wanted = "a number word from one to ten" if is_number else "Yes"
            raise ValueError(f"got the answer {answer!r} to {question!r}, expected {wanted}")
        if skill not in SKILLS:
            raise ValueError(f"got the skill {skill!r}, expected one of {', '.join(SKILLS)}")
        atoms.append(Atom(question, answer, skill))
    if not atoms:
        raise ValueError("got no questions, expected one or more")
    return GenEval2Item(identity, str(value["prompt"]), int(value["atom_count"]), tuple(atoms))


def write_prompts(path: str | Path, items: Sequence[GenEval2Item]) -> None:
    """Write a file that GenEval 2's own scripts read."""
    lines = []
    for item in items:
        value = {"prompt": item.prompt, "atom_count": item.atom_count}
        asked = [[atom.question, atom.answer] for atom in item.atoms]
        skills = [atom.skill for atom in item.atoms]
        lines.append(json.dumps(value | {"vqa_list": asked, "skills": skills}) + "\n")
    write_text(path, "".join(lines))
