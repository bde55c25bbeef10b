"""Ctrl-C, or the SIGTERM of a scheduler that takes a machine back, ends a training after its step, with a checkpoint."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from vqrae.common.distributed import end_process_group, is_main_process


class StopRequest:
    """Notes SIGINT and SIGTERM within its block; a second one ends the process at once.

    Processes get their signals at different steps, so they agree on one. What they sum up behind a step is read behind the
    next: by then the device has done it, and no step waits for it.

    Attributes:
        signal: the number of the signal that came, to this or (once agreed) to any process; 0 for none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.signal = device, 0
        self._process = os.getpid()
        self._handlers: dict[int, Any] = {}
        self._answer: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __enter__(self) -> "StopRequest":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # only that one may handle signals
            self._handlers = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
        if os.getpid() != self._process:  # a worker of a loader, which its training will end
            return
        self.signal = number
        name = signal.Signals(number).name
        print(
            f"{name}: the training stops after this step and keeps a checkpoint",
            file=sys.stderr,
            flush=True,
        )

    def agreed(self) -> bool:
        """Whether to stop here. Every process asks behind every step, and all get the same answer."""
        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return self.signal != 0
        answer, self._answer = self._answer, self._ask()
        if answer is None:
            return False
        found, copied = answer
        if copied is not None:
            copied.synchronize()
        self.signal = self.signal or int(found)
        return int(found) != 0

    def end_process(self, step: int) -> NoReturn:
        """Say that the training ends behind `step`, and leave with the exit code of the signal."""
        if is_main_process():
            print(f"stopped at step {step}: the same command continues", flush=True)
        end_process_group()
        raise SystemExit(128 + self.signal)

    def _ask(self) -> tuple[Tensor, torch.cuda.Event | None]:
        found = torch.full((), self.signal, device=self.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        if found.device.type != "cuda":
            return found, None
        host, copied = torch.empty_like(found, device="cpu", pin_memory=True), torch.cuda.Event()
        host.copy_(found, non_blocking=True)
        copied.record()
        return host, copied
