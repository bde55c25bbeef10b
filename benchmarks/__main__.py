"""Run benchmarks by name, or all of them: python -m benchmarks [NAME ...]

Each prints a table and writes runs/benchmarks/NAME.json. A ratio above 1 means that ours is better.
"""

import importlib
import sys
from pathlib import Path

from benchmarks.harness import print_table
from vqrae.common.config import ConfigError, did_you_mean
from vqrae.common.errors import run_main
from vqrae.common.files import write_json

NAMES = ("extract", "frechet", "loss", "packing", "quantizer", "sampler", "training")


def main(argv: list[str] | None = None) -> None:
    names = list(sys.argv[1:] if argv is None else argv) or NAMES
    if "--help" in names or "-h" in names:
        print(f"{__doc__}\nNAME: {', '.join(NAMES)}")
        return
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"unknown benchmark {name!r}. {did_you_mean(name, NAMES)}")
    for name in names:
        rows = importlib.import_module(f"benchmarks.{name}").run()
        print_table(name, rows)
        path = Path("runs/benchmarks") / f"{name}.json"
        write_json(path, {"rows": [row._asdict() for row in rows]})
        print(f"written to {path}")


if __name__ == "__main__":
    run_main(main)
