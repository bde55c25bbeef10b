"""What a user reads when something goes wrong: one line and an exit code. Light to import."""

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

DIVERGED, MISTAKE = 1, 2
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells report them
DEBUG_VARIABLE = "VQRAE_DEBUG"


def require_package(module: str, purpose: str) -> None:
    """Refuse work that needs an optional package, before it begins; ValueError says how to install
    it.
    """
    if importlib.util.find_spec(module) is None:
        command = _install_command(module)
        raise ValueError(f"{purpose} needs the package {module}, which is not installed: {command}")


def exit_code(run: Callable[[], int | None], program: str) -> int:
    """Run a command; a fault of its input or machine becomes one line on stderr, not a traceback.

    Errors of the program (TypeError, KeyError, …) keep their traceback; VQRAE_DEBUG=1 shows all.
    Returns what `run` returned (0 for None), 2 for a mistake of the user, 1 for a training that
    diverged, 130 after Ctrl-C; SIGTERM raises SystemExit with 143.
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
    """Run the `main` of a module that was started with `python -m`, and exit with its code."""
    spec = sys.modules["__main__"].__spec__
    code = exit_code(main, spec.name if spec else Path(sys.argv[0]).name)
    if code == 0 and "torch" in sys.modules:
        from vqrae.common.distributed import end_process_group

        end_process_group()
    sys.exit(code)


@contextmanager
def _ended_by_terminate(program: str) -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C, so that `finally` and `with` run; a second one kills."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == process:  # a forked worker inherits this handler
            _report(program, "terminated")
        raise SystemExit(TERMINATED)

    # Only the main thread may handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(program: str, message: str) -> None:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    process = f" (process {os.environ['RANK']})" if several else ""
    print(f"{program}{process}: {message}", file=sys.stderr, flush=True)


def _message(error: Exception) -> str | None:
    """What to tell the user; None for an error of the program, whose traceback is wanted."""
    line = _one_line(error)
    if isinstance(error, ImportError):
        return _missing_package(error)
    if _is_out_of_memory(error):
        return f"out of memory, choose a smaller batch: {line}"
    if "DataLoader timed out" in line or "DataLoader worker" in line:
        return (
            f"the workers that load data stopped ({line}): mostly /dev/shm is full (df -h /dev/shm;"
            " in docker --shm-size=16g). Make room, or set num_workers / "
            "dataloader_num_workers to 0"
        )
    of_ours = type(error).__module__.startswith("vqrae.")
    if not (of_ours or isinstance(error, ValueError | OSError | FloatingPointError)):
        return None
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{Path(os.fsdecode(error.filename)).absolute()}: {error.strerror}")
    # The problems of a configuration have a line each.
    text = printable(str(error)) if of_ours else line
    folder = printable(os.getcwd())
    if type(error) is FileNotFoundError and folder not in text:
        text += f" (relative paths start at {folder})"
    return text if of_ours or _is_raised_here(error) else f"{text} ({DEBUG_VARIABLE}=1 shows where)"


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator: can't allocate" in str(error)  # a plain RuntimeError


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    # A loader wraps what its workers raise.
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return printable(" ".join(text.split())) or type(error).__name__


def _is_raised_here(error: Exception) -> bool:
    """Whether code of this package raised it, and not a library, whose messages say too little."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__package__") if trace is not None else None
    return (package or "").startswith("vqrae.")


def _missing_package(error: ImportError) -> str | None:
    if not isinstance(error, ModuleNotFoundError):
        # transformers and accelerate raise it without a name for a missing package of their extras.
        return None if error.name else _one_line(error)
    top = (error.name or "").partition(".")[0]
    if top not in _optional_packages():
        return None
    return f"the package {top} is not installed: {_install_command(top)}"


def _install_command(module: str) -> str:
    return f"{sys.executable} -m pip install '{_optional_packages().get(module, module)}'"


def _optional_packages() -> dict[str, str]:
    """Requirements of the extras, such as `peft>=0.17`, by the name that imports the package."""
    found = {}
    for line in importlib.metadata.requires("vqrae") or []:
        requirement, _, marker = line.partition(";")
        if "extra" in marker:
            name = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]
            found[name.lower().replace("-", "_")] = requirement.strip()
    return found
