"""What a resume needs beside the model folder: optimizers, random numbers, and everything that is counted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vqrae.common.distributed import is_main_process
from vqrae.common.files import read_json, write_json
from vqrae.tokenizer.meters import LossWindow
from vqrae.tokenizer.usage import CodeUsage


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The moving parts of a training, which are saved and loaded in place.

    Attributes:
        engines: by name; each saves its model and optimizer, partitioned or not.
        shared: objects with a `state_dict` that is the same on all processes.
        windows: what each process counts for itself. Their sum is saved, so that it does not matter how many continue.
    """

    engines: dict[str, Accelerator]
    shared: dict[str, Any]
    windows: dict[str, LossWindow | CodeUsage]

    def save(self, folder: Path, step: int) -> None:
        """Write everything as it is behind `step`; all processes take part."""
        for name, engine in self.engines.items():
            engine.wait_for_everyone()
            engine.save_state(str(folder / name))
            engine.wait_for_everyone()
        for window in self.windows.values():
            window.gather(engine)
        if is_main_process():
            parts = {name: part.state_dict() for name, part in (self.shared | self.windows).items()}
            torch.save(parts, folder / "counters.pt")
            write_json(folder / "state.json", {"step": step})
        else:
            self._reset_windows()

    def load(self, folder: Path) -> int:
        """Read what `save` wrote and return its step."""
        for name, engine in self.engines.items():
            engine.load_state(str(folder / name))
        parts = torch.load(folder / "counters.pt", weights_only=True)
        for name, part in (self.shared | (self.windows if is_main_process() else {})).items():
            part.load_state_dict(parts[name])
        if not is_main_process():
            self._reset_windows()
        return read_json(folder / "state.json")["step"]

    def _reset_windows(self) -> None:
        for window in self.windows.values():
            window.reset()
