"""Run benchmarks by name, or all of them.

python -m vqrae.benchmarks [NAME ...]
"""

import importlib
import pkgutil
import sys

import vqrae.benchmarks
from vqrae.benchmarks.harness import write_table
from vqrae.common.config import did_you_mean
from vqrae.common.errors import run_main

NAMES = sorted(
    {module.name for module in pkgutil.iter_modules(vqrae.benchmarks.__path__)}
    - {"harness", "check_gpu", "__main__"}
)


def main(argv: list[str] | None = None) -> None:
    names = list(sys.argv[1:] if argv is None else argv)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}. {did_you_mean(unknown[0], NAMES)}")
    for name in names or NAMES:
        rows = importlib.import_module(f"vqrae.benchmarks.{name}").run()
        print(f"written to {write_table(name, rows)}")


if __name__ == "__main__":
    run_main(main)
