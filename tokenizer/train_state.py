"""What a resume needs beside the model folder: optimizers, random numbers, and everything that is counted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vqrae.common.distributed import is_main_process, require_same_partition, world_size
from vqrae.common.files import read_json, write_json
from vqrae.tokenizer.codebook import CodeUsage
from vqrae.tokenizer.meters import LossWindow

_STATE = "state.json"


def require_resumable(folder: Path, *, zero: int) -> None:
    """Refuse a training state whose parts are not for these processes; ValueError says what to set."""
    require_same_partition(folder, read_json(folder / _STATE), zero=zero)


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The moving parts of a training, which are saved and loaded in place.

    Attributes:
        zero: ZeRO's stage, 0 for none.
        engines: by name; each saves its model and optimizer, partitioned or not.
        shared: objects with a `state_dict` that is the same on all processes.
        windows: what each process counts for itself. Their sum is saved, so that it does not matter how many continue.
    """

    engines: dict[str, Accelerator]
    zero: int
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
            write_json(
                folder / _STATE, {"step": step, "zero": self.zero, "processes": world_size()}
            )
        self._leave_windows_to_main()

    def load(self, folder: Path) -> int:
        """Read what `save` wrote and return its step."""
        for name, engine in self.engines.items():
            engine.load_state(str(folder / name))
            engine.step = 0  # micro-batches into a step: the saved count is a multiple of another accumulation
        # Else every process would unpack them on the main one's GPU; on CPU, accelerate numbers devices that are none.
        device = engine.device if engine.device.type != "cpu" else torch.device("cpu")
        parts = torch.load(folder / "counters.pt", weights_only=True, map_location=device)
        for name, part in (self.shared | self.windows).items():
            part.load_state_dict(parts[name])
        self._leave_windows_to_main()
        return read_json(folder / _STATE)["step"]

    def _leave_windows_to_main(self) -> None:
        if not is_main_process():
            for window in self.windows.values():
                window.clear()
