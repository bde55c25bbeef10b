"""Where a training's numbers, images and histograms go in addition to `metrics.jsonl`.

wandb and trackio continue the run that an earlier launch began. (accelerate's trackers would start
the process group before a training says how, and know neither histograms nor trackio's images.)
"""

import importlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from vqrae.common.config import read_yaml
from vqrae.common.errors import require_package
from vqrae.common.files import read_json, write_json

TrackerName = Literal["tensorboard", "wandb", "trackio"]
_IDENTITY = "tracking.json"
_running: list["Service"] = []  # of the run that this process works on


class Tracker(Protocol):
    """What every tracker takes, by the names of its values."""

    def numbers(self, step: int, values: dict[str, float]) -> None: ...
    def images(self, step: int, values: dict[str, Image.Image]) -> None: ...
    def histograms(self, step: int, values: dict[str, np.ndarray]) -> None: ...


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse, with ValueError, trackers whose package is not installed."""
    for name in names:
        require_package(name, f"report_to={name}")


def start_trackers(names: Sequence[TrackerName], folder: Path) -> list[Tracker]:
    """The trackers of a run directory, ready; those of the run before are finished."""
    while _running:
        _running.pop().run.finish()
    _running.extend(Service(name, folder) for name in names if name != "tensorboard")
    files: list[Tracker] = [TensorBoard(folder)] if "tensorboard" in names else []
    return [*files, *_running]


class TensorBoard:
    """Events in the run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "events"
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        """Opened when it is needed: a run that logs nothing leaves no empty file."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        return self._writer

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, values: dict[str, Image.Image]) -> None:
        for name, image in values.items():
            self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        for name, sample in values.items():
            self.writer.add_histogram(name, sample, step)


class Service:
    """wandb or trackio, whose interfaces agree."""

    def __init__(self, name: TrackerName, folder: Path) -> None:
        self.package: Any = importlib.import_module(name)
        if not (folder / _IDENTITY).is_file():
            write_json(folder / _IDENTITY, {"id": uuid.uuid4().hex[:8]})
        identity = read_json(folder / _IDENTITY)["id"]
        title = "-".join(folder.absolute().parts[-2:])
        options: dict[str, Any] = {"name": f"{title}-{identity}", "resume": "allow"}
        if name == "wandb":
            options |= {"id": identity, "dir": str(folder)}
        project = os.environ.get("WANDB_PROJECT", "vqrae")
        try:
            self.run = self.package.init(
                project=project, config=recorded_settings(folder), **options
            )
        except Exception as error:  # wandb and trackio have classes of their own, also for no login
            raise ValueError(f"report_to={name} cannot start: {error}") from error

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def images(self, step: int, values: dict[str, Image.Image]) -> None:
        shown = {name: self.package.Image(image) for name, image in values.items()}
        self.run.log(shown, step=step)

    def histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        counted = {name: self.package.Histogram(sample) for name, sample in values.items()}
        self.run.log(counted, step=step)


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a run, which may be that of the run that it is a stage of."""
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file():
            return read_yaml(place / "config.yaml")
    return {}
