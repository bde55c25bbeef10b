"""Print what the Python that runs this file lacks: vqrae from this repository, or what it requires.

    PYTHON scripts/missing.py [EXTRA ...]

It is run by its path, before anything is installed.
"""

import importlib.metadata
import re
import sys
from pathlib import Path


def missing(extras: list[str]) -> list[str]:
    """The requirements of vqrae and of these extras that are not installed."""
    try:
        import vqrae.common
    except ImportError:
        return ["vqrae"]
    root = Path(__file__).resolve().parents[1]
    if not Path(vqrae.common.__file__).resolve().is_relative_to(root):
        return ["vqrae"]  # that of another copy
    found = []
    for line in importlib.metadata.requires("vqrae") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == .([\w-]+)", marker)
        name = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]
        try:
            if extra is None or extra[1] in extras:
                importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(requirement.strip())
    return found


if __name__ == "__main__":
    for requirement in missing(sys.argv[1:]):
        print(requirement)
