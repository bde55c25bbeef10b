"""What a user reads when something goes wrong: one line on stderr and an exit code. Importing it costs nothing heavy."""

import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vqrae.common.files import printable

DIVERGED, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM
DEBUG_VARIABLE = "VQRAE_DEBUG"


def require_package(module: str, purpose: str) -> None:
    """Refuse work that needs an optional package, before it begins.

    Raises:
        ValueError: naming the package and the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{purpose} needs the package {module}, which is not installed: {_install_command(module)}"
        )


def exit_code(run: Callable[[], int | None], program: str) -> int:
    """Run a command; what is wrong with its input or its machine becomes one line on stderr, not a traceback.

    Errors of the program itself (TypeError, KeyError, …) keep their traceback; VQRAE_DEBUG=1 shows that of all.

    Args:
        program: named at the beginning of the line.

    Returns:
        What `run` returned (0 for None), 2 for a mistake of the user, 1 for a training that diverged, 130 after Ctrl-C.

    Raises:
        SystemExit: with 143, after SIGTERM.
    """
    try:
        with _ended_by_terminate(program):
            return run() or 0
    except KeyboardInterrupt:
        _report(program, "interrupted")
        return INTERRUPTED
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        _report(program, message)
        return DIVERGED if isinstance(error, FloatingPointError) else MISTAKE


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a module that was started with `python -m`, and end the process with its exit code."""
    spec = sys.modules["__main__"].__spec__
    code = exit_code(main, spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name)
    if code == 0 and "torch" in sys.modules:
        from vqrae.common.distributed import end_process_group

        end_process_group()
    sys.exit(code)


@contextmanager
def _ended_by_terminate(program: str) -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does, so that `finally` and `with` come to their end; a second one at once."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == process:  # not a worker that was forked from it
            _report(program, "terminated")
        raise SystemExit(TERMINATED)

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only that one may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(program: str, message: str) -> None:
    process = (
        f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    )
    print(f"{program}{process}: {message}", file=sys.stderr, flush=True)


def _message(error: Exception) -> str | None:
    """What to tell the user; None for an error of the program, whose traceback is wanted."""
    torch = sys.modules.get("torch")
    no_memory = "DefaultCPUAllocator: can't allocate" in str(error)  # a plain RuntimeError
    if (
        no_memory
        or isinstance(error, MemoryError)
        or (torch and isinstance(error, torch.OutOfMemoryError))
    ):
        return f"out of memory, choose a smaller batch: {_one_line(error)}"
    if isinstance(error, ImportError):
        return _missing_package(error)
    of_ours = type(error).__module__.startswith("vqrae.")
    if not (of_ours or isinstance(error, ValueError | OSError | FloatingPointError)):
        return None
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{Path(os.fsdecode(error.filename)).absolute()}: {error.strerror}")
    text = (
        printable(str(error)) if of_ours else _one_line(error)
    )  # the problems of a configuration have a line each
    folder = printable(os.getcwd())
    if type(error) is FileNotFoundError and folder not in text:
        text += f" (relative paths start at {folder})"
    return text if of_ours or _is_raised_here(error) else f"{text} ({DEBUG_VARIABLE}=1 shows where)"


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if (
        text.startswith("Caught ") and "Original Traceback" in text
    ):  # the loader wraps what its workers raise
        text = text.splitlines()[-1].partition(": ")[2]
    return printable(" ".join(text.split())) or type(error).__name__


def _is_raised_here(error: Exception) -> bool:
    """Whether code of this package raised it, and not a library, whose messages may say too little."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and (trace.tb_frame.f_globals.get("__package__") or "").startswith(
        "vqrae."
    )


def _missing_package(error: ImportError) -> str | None:
    if not isinstance(error, ModuleNotFoundError):
        # transformers and accelerate say so, without a name, where a package of their own extras is missing.
        return None if error.name else _one_line(error)
    top = (error.name or "").partition(".")[0]
    return (
        f"the package {top} is not installed: {_install_command(top)}"
        if top in _optional_packages()
        else None
    )


def _install_command(module: str) -> str:
    return f"{sys.executable} -m pip install '{_optional_packages().get(module, module)}'"


def _optional_packages() -> dict[str, str]:
    """The requirement of each package of the extras, such as `peft>=0.17`, by the name that it is imported by."""
    found = {}
    for line in importlib.metadata.requires("vqrae") or []:
        requirement, _, marker = line.partition(";")
        if "extra" in marker:
            name = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]
            found[name.lower().replace("-", "_")] = requirement.strip()
    return found
