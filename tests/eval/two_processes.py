"""Run commands on two CPU processes each: `python two_processes.py MODULE NAME=VALUE,... ARGUMENT ... [-- MODULE ...]`.

Modules are imported once and the pairs forked, which costs a test a fraction of a launch each. NAME=VALUE sets numbers of
the module, so that small inputs have shares for both processes.
"""

import importlib
import itertools
import os
import socket
import sys
from multiprocessing import get_context
from types import ModuleType


def work(module: ModuleType, arguments: list[str], rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    module.main(arguments)


def run(name: str, settings: str, *arguments: str) -> None:
    module = importlib.import_module(name)
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        getattr(module, key)  # a renamed one must not pass unseen
        setattr(module, key, int(value))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    pair = [
        context.Process(target=work, args=(module, list(arguments), rank, port))
        for rank in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    if any(process.exitcode for process in pair):
        sys.exit(f"{name}: exit codes {[process.exitcode for process in pair]}")


if __name__ == "__main__":
    for is_separator, command in itertools.groupby(sys.argv[1:], lambda argument: argument == "--"):
        if not is_separator:
            run(*command)
