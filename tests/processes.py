"""Jobs on one or several CPU processes, forked from a server that has imported the libraries once.

launch("vqrae.generation.train", ["tiny", ...], processes=2)
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

SERVER = multiprocessing.get_context("forkserver")
JOBS = ["vqrae.tokenizer.train", "vqrae.understanding.train", "vqrae.generation.train"]
JOBS += ["vqrae.mllm.train"]
SERVER.set_forkserver_preload(["accelerate", "deepspeed", *JOBS])


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    function: str = "main",
    settings: Mapping[str, int] | None = None,
) -> str:
    """Call a function of a module in processes of one group; what they print.

    Also for one process: what other tests have set in this one would change its rounding.

    Args:
        settings: numbers of the module that are other ones here.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        job = (module, function, list(arguments), dict(settings or {}))
        workers = []
        for rank, log in enumerate(logs):
            place = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(SERVER.Process(target=_work, args=(*job, place, str(log))))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
            worker.kill()
        printed = "".join(log.read_text() for log in logs if log.exists())
    codes = [worker.exitcode for worker in workers]
    assert codes == [0] * processes, f"{module}: exit codes {codes}\n{printed[-3000:]}"
    return printed


def _work(
    name: str,
    function: str,
    arguments: list[str],
    settings: dict[str, int],
    place: dict[str, str],
    log: str,
) -> None:
    with open(log, "w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    os.environ |= place
    torch.set_num_threads(1)
    gc.freeze()  # collections would copy the server's memory
    module = importlib.import_module(name)
    for key, value in settings.items():
        getattr(module, key)  # a renamed one must not pass unseen
        setattr(module, key, value)
    getattr(module, function)(arguments)


HOLD = """
import fcntl, os, sys
stream = open(sys.argv[1], "a+")
fcntl.lockf(stream, fcntl.LOCK_EX)
print("process", os.getpid(), "on another", file=stream, flush=True)
print(flush=True)
input()
"""


@contextlib.contextmanager
def locked(file: Path) -> Iterator[str]:
    """A block in which another process holds a lock; what is said of it."""
    command, pipe = [sys.executable, "-c", HOLD, str(file)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "\n"
        yield f"is in use by process {other.pid} on"
        other.kill()
