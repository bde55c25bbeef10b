"""Questions from a JSONL file, answers to another one, in the same order: evaluation sets of one's own, or captions in bulk.

A line of the questions is `{"question": TEXT, "image": FILE or [FILES] or absent, …}`; LLaVA's evaluation files, which say
`text` for `question`, are read as they are. A line of the answers is that line with `answer` added, or with `prediction` where
the line has an `answer` of its own, such as the right one. What was answered before an interruption stays; a question that
cannot be answered, such as one whose image cannot be read, costs its own answer only.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.files import json_lines, parse_json, read_json, write_json
from vqrae.common.run import hold, run_manifest
from vqrae.data.conversations import image_paths
from vqrae.understanding.chat import Chat, Messages, user_message

ANSWER_KEYS = ("answer", "prediction", "vqrae_answer")
"""The first that a question does not hold itself gets its answer."""
ERROR_KEYS = ("error", "vqrae_error")


@dataclass(frozen=True)
class Answered:
    """What a run did: answers in the file, how many of them were there before, how many questions failed."""

    total: int
    resumed: int
    failed: int


def answer_file(
    chat: Chat,
    questions: str | Path,
    out: str | Path,
    *,
    fingerprint: str,
    image_folder: str | Path | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Answered:
    """Answer every line of `questions`; an answer does not depend on `batch_size`.

    Args:
        out: file of the answers, continued where it ends; `OUT.manifest.json` beside it says what made them.
        fingerprint: of the model's weights.
        image_folder: where images lie; None means beside the questions.
        progress: called with (done, total).

    Raises:
        ValueError: before anything is answered, naming the line, for a line that is no question; and when `out` holds answers
            to other questions, or those of another model or image folder, or when another process writes to it.
    """
    questions, out = Path(questions), Path(out)
    records = read_questions(questions)
    folder = questions.parent if image_folder is None else Path(image_folder)
    settings = {
        "model": fingerprint,
        "max_new_tokens": str(chat.max_new_tokens),
        "image_folder": str(folder.resolve()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    hold(out.with_name(f".{out.name}.lock"), str(out))
    done = _resume(out, records, settings)
    write_json(_manifest(out), run_manifest(fingerprints=settings))
    failed = 0
    with out.open("a", encoding="utf-8") as stream:
        for start in range(done, len(records), batch_size):
            batch = records[start : start + batch_size]
            answers = _answer(chat, batch, folder)
            failed += sum(isinstance(answer, ValueError) for answer in answers)
            lines = [
                json.dumps(_answered(record, answer), ensure_ascii=False)
                for record, answer in zip(batch, answers, strict=True)
            ]
            stream.write("".join(f"{line}\n" for line in lines))
            stream.flush()
            if progress is not None:
                progress(start + len(batch), len(records))
    return Answered(len(records), done, failed)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The records of a questions file, checked."""
    records = []
    for number, record in json_lines(path):
        if not isinstance(record, dict) or not isinstance(_question(record), str):
            raise ValueError(
                f'{path}, line {number}: got {str(record)[:80]!r}, expected {{"question": TEXT, "image": FILE}}'
            )
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no questions")
    return records


def _question(record: dict[str, Any]) -> Any:
    return record.get("question", record.get("text"))


def _answer(chat: Chat, records: Sequence[dict[str, Any]], folder: Path) -> list[str | ValueError]:
    """The answer to each record in one batch, or why there is none."""
    asked: list[Messages | ValueError] = []
    for record in records:
        try:
            asked.append(
                [user_message(_question(record), [folder / path for path in image_paths(record)])]
            )
        except ValueError as error:
            asked.append(error)
    answers = iter(
        _generate(chat, [messages for messages in asked if not isinstance(messages, ValueError)])
    )
    return [item if isinstance(item, ValueError) else next(answers) for item in asked]


def _generate(chat: Chat, chats: Sequence[Messages]) -> list[str | ValueError]:
    """Answers in one batch, or one by one where the batch holds a question that the model cannot take."""
    try:
        return [*(chat.generate(chats) if chats else [])]
    except ValueError as error:
        return (
            [error]
            if len(chats) == 1
            else [answer for each in chats for answer in _generate(chat, [each])]
        )


def _answered(record: dict[str, Any], answer: str | ValueError) -> dict[str, Any]:
    """A line of the answers; what the record holds stays."""
    names = ERROR_KEYS if isinstance(answer, ValueError) else ANSWER_KEYS
    return {**record, next(name for name in names if name not in record): str(answer)}


def _manifest(out: Path) -> Path:
    return out.with_name(f"{out.name}.manifest.json")


def _resume(out: Path, records: Sequence[dict[str, Any]], settings: dict[str, str]) -> int:
    """How many answers `out` holds; a last line that a crash cut short is removed."""
    if not out.exists():
        return 0
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    made_with = read_json(_manifest(out))["fingerprints"] if _manifest(out).exists() else None
    # Earlier versions did not record everything.
    if lines and (
        made_with is None
        or any(made_with.get(name, value) != value for name, value in settings.items())
    ):
        raise ValueError(
            f"{out} holds answers made with {made_with}, now it is {settings}: give another file, or remove it"
        )
    for number, line in enumerate(lines):
        record = parse_json(line, f"{out}, line {number + 1}")
        given = records[number] if number < len(records) else None
        added = {*ANSWER_KEYS, *ERROR_KEYS} - (given or {}).keys()
        answered = {key: value for key, value in record.items() if key not in added}
        if answered != given:
            raise ValueError(
                f"{out}, line {number + 1} answers {answered}, but the question is {given}: give another file"
            )
    if len(whole) < len(text):
        with out.open("r+b") as stream:
            stream.truncate(len(whole))
    return len(lines)
