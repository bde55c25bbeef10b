"""The fake GPU (`vqrae.planning.fake_gpu`), watched for what only a GPU would show.

with fake_gpu() as gpu:
    model = build_model().to("cuda")
    with gpu.no_waiting():  # the host may not wait for the device in here
        model(images).sum().backward()
"""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback

from vqrae.planning import fake_gpu as planning

ROOT = str(Path(__file__).parents[1])
TESTS = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)
PACKAGES = str(Path(torch.__file__).parents[1])  # an environment may be a folder of the repository


class WatchedGPU(planning.FakeGPU):
    """Lists in `waits` what made the host wait since it was last cleared, with our line."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.waits: list[str] = []

    @contextlib.contextmanager
    def no_waiting(self, *allowed: str) -> Iterator[None]:
        """A block in which the host must not wait, except where a part of the note is `allowed`."""
        self.waits.clear()
        yield
        self.check(allowed)

    def check(self, allowed: Sequence[str]) -> None:
        """Fail with what made the host wait, unless it is allowed."""
        found = [wait for wait in self.waits if not any(part in wait for part in allowed)]
        assert found == [], "the host waits for the device:\n  " + "\n  ".join(found)

    def note(self, kind: str) -> None:
        hidden = (__file__, planning.__file__, "<")
        hidden += (f"{TORCH}/_", f"{TORCH}/utils/_", f"{TORCH}/overrides")
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith(hidden)]
        theirs = (TESTS, PACKAGES)
        ours = [
            f for f in frames if f.filename.startswith(ROOT) and not f.filename.startswith(theirs)
        ]
        places = dict.fromkeys(
            f"{frame.filename.removeprefix(ROOT)}:{frame.lineno}"
            for frame in (ours[-1:] + frames[-1:])
        )
        self.waits.append(f"{kind} at {' in '.join(places)}")


class Generators(TorchFunctionMode):
    """Refuses random numbers of one device from a generator of another, as a driver would."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            own = args[0].device if args and isinstance(args[0], Tensor) else "cpu"
            device = torch.device(kwargs.get("device") or own)
            assert generator.device.type == device.type, (
                f"{func}: generator on {generator.device}, numbers on {device}"
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu(count: int = 1) -> Iterator[WatchedGPU]:
    """A watched machine with `count` GPUs."""
    with planning.fake_gpu(count, WatchedGPU) as gpu, Generators():
        yield gpu


class NoWaiting(TrainerCallback):
    """Checks that a `Trainer`'s host never waits for the device, after the first step to the last.

    Args:
        allowed: parts of notes that are well known.
    """

    def __init__(self, gpu: WatchedGPU, *allowed: str) -> None:
        self.gpu, self.allowed, self.steps = gpu, allowed, 0

    def follow(self, kind: type[Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
        """Become a callback of every trainer of this kind."""
        start = kind.__init__

        def begin(trainer: Trainer, *args: Any, callbacks: list, **rest: Any) -> None:
            start(trainer, *args, callbacks=[*callbacks, self], **rest)

        monkeypatch.setattr(kind, "__init__", begin)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begun:
            self.gpu.check(self.allowed)
        self.begun, self.steps = True, self.steps + 1
        self.gpu.waits.clear()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gpu.waits.clear()
