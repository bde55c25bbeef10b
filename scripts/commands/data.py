"""What to know of data before training on it."""

import argparse
from dataclasses import asdict
from typing import Any

from vqrae.scripts.commands.shared import add_command


def register(commands: Any) -> None:
    """Add this module's commands."""
    command = add_command(commands, "check-data", check_data, "read a whole data source before training on it")
    command.description = check_data.__doc__
    command.add_argument(
        "source", help="scenes, emoji, a folder, FILE.jsonl, FILE.tar (or a glob), hf:NAME, FILE.json, code shards, a mixture"
    )
    command.add_argument("--image-folder", help="where the pictures of a FILE.json lie (default: beside it)")
    command.add_argument("--limit", type=int, help="read so many samples, evenly spread (default: all)")
    command.add_argument("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    command.add_argument("--json", metavar="FILE", help="write the whole report there, too")


def check_data(arguments: argparse.Namespace) -> int:
    """Read a source before training on it: sizes, broken and missing pictures, captions, duplicates. Exit code 1: problems."""
    from vqrae.common.cli import progress_line
    from vqrae.common.files import write_json
    from vqrae.data.checks import check_source
    from vqrae.data.mixture import parse_mixture

    if min(arguments.limit or 1, arguments.workers + 1) < 1:
        raise ValueError(f"got --limit {arguments.limit} --workers {arguments.workers}, expected positive numbers")
    reports = []
    for source in [name for name, _ in parse_mixture(arguments.source)] or [arguments.source]:
        progress = progress_line("check-data")
        options = {"image_folder": arguments.image_folder, "limit": arguments.limit, "workers": arguments.workers}
        reports.append(check_source(source, progress=progress, **options))
        print(reports[-1].text())
    if arguments.json:
        write_json(arguments.json, [asdict(report) for report in reports])
    return 1 if any(report.problems for report in reports) else 0
