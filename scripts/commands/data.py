"""What to know of data before training on it."""

import argparse
import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vqrae.scripts.commands.shared import add_command
from vqrae.scripts.commands.training import add_config, processor_of, read_run

if TYPE_CHECKING:
    from vqrae.data.checks import Examine


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(
        commands, "check-data", check_data, "read a whole data source before training on it"
    )
    command.description = check_data.__doc__
    command.add_argument(
        "source",
        help="scenes, emoji, a folder, FILE.jsonl, FILE.tar (or a glob), hf:NAME, FILE.json, code shards, a mixture",
    )
    command.add_argument(
        "--image-folder", help="where the images of a FILE.json lie (default: beside it)"
    )
    command.add_argument(
        "--limit", type=int, help="read so many samples, evenly spread (default: all)"
    )
    command.add_argument(
        "--workers", type=int, default=0, help="processes that decode (default: %(default)s)"
    )
    command.add_argument("--json", metavar="FILE", help="write the whole report there, too")
    command.add_argument(
        "--write-clean",
        metavar="FILE",
        help="of a FILE.json or FILE.jsonl, write what is usable there",
    )
    add_config(command)


def check_data(arguments: argparse.Namespace) -> int:
    """Read a source before training on it: sizes, broken and missing images, captions, duplicates. Exit code 1: problems.

    With --config, which names a LLaVA run, also conversations that are too long for it, and words that it has no ids for. With
    --write-clean, what is usable of a FILE.json or FILE.jsonl is written, and the exit code is 0.
    """
    from vqrae.common.cli import progress_line
    from vqrae.common.files import write_json
    from vqrae.data.checks import check_source, require_target, write_clean
    from vqrae.data.stream import parse_mixture

    if min(1 if arguments.limit is None else arguments.limit, arguments.workers + 1) < 1:
        raise ValueError(
            f"got --limit {arguments.limit} --workers {arguments.workers}, expected positive numbers"
        )
    if arguments.write_clean:
        require_target(arguments.source, arguments.write_clean, arguments.image_folder)
    examine = length_examiner(arguments) if arguments.config else None
    reports = []
    for source in [name for name, _ in parse_mixture(arguments.source)] or [arguments.source]:
        progress = progress_line("check-data")
        options = {
            "image_folder": arguments.image_folder,
            "limit": arguments.limit,
            "workers": arguments.workers,
        }
        reports.append(check_source(source, progress=progress, examine=examine, **options))
        print(reports[-1].text())
        if arguments.config and (words := words_in_question(arguments, source)):
            print(f"note: {words}")
    if arguments.json:
        write_json(arguments.json, [asdict(report) for report in reports])
    if arguments.write_clean:
        options = {
            "image_folder": arguments.image_folder,
            "examine": examine,
            "unfit": reports[0].unfit,
        }
        kept = write_clean(arguments.source, arguments.write_clean, **options)
        print(f"{arguments.write_clean}: {kept.written} of {kept.total} entries")
        return 0
    return 1 if any(report.problems for report in reports) else 0


def words_in_question(arguments: argparse.Namespace, source: str) -> str | None:
    """The words of conversations that the run's language model has no ids for, in one line."""
    from vqrae.common.files import printable
    from vqrae.data.word_tokenizer import is_word_tokenizer
    from vqrae.understanding.words import describe_unknown, texts_in

    text_tokenizer = processor_of(read_run(arguments)).tokenizer
    words = describe_unknown(text_tokenizer, texts_in(source))
    if words is None:
        return None
    return printable(
        f"{words}; training gives them ids" if is_word_tokenizer(text_tokenizer) else words
    )


def length_examiner(arguments: argparse.Namespace) -> "Examine":
    """Finds the conversations that are longer than the run's max_length."""
    from vqrae.understanding.conversation import examine_length

    config = read_run(arguments)
    return functools.partial(
        examine_length, processor=processor_of(config), max_length=config.max_length
    )
