"""A run directory: resolved config, manifest, metrics (JSON lines and trackers), checkpoints.

It belongs to one launch at a time, and to the settings that its contents were made with: a relaunch
resumes with the same settings and is refused with others. So `config.yaml` and `manifest.json`
always tell what made the model.
"""

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from vqrae.common.checkpoints import numbered
from vqrae.common.config import parse_yaml, to_yaml
from vqrae.common.distributed import is_main_process
from vqrae.common.files import (
    discard,
    parse_json,
    raw_lines,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from vqrae.common.tracking import Tracker, TrackerName, require_trackers, start_trackers

# Fields of any configuration that may change between the launches of one run: they decide how it is
# computed and what it reports, not the result. The tokenizer may move; its fingerprint is compared.
FREE_SETTINGS = {"output_dir", "stage", "dry_run", "tokenizer"}
FREE_SETTINGS |= {"micro_batch_size", "attention", "attn_implementation", "compile"}
FREE_SETTINGS |= {"activation_checkpointing", "gradient_checkpointing", "perceptual_weights"}
FREE_SETTINGS |= {"num_workers", "dataloader_num_workers", "max_nonfinite_steps"}
FREE_SETTINGS |= {"save_steps", "save_total_limit", "keep_checkpoints"}
FREE_SETTINGS |= {"log_steps", "logging_steps", "sample_steps", "previews", "report_to"}
# The work that a run keeps, in its folder or in that of a stage.
_RESULTS = ("model", "checkpoint-*", "step-*", "*/model", "*/checkpoint-*", "*/step-*")
_PACKAGES = ["torch", "torchvision", "transformers", "accelerate", "deepspeed", "numpy"]
_PACKAGES += ["lmms-eval"]
_STEPS_FILE = "training.json"
_locks: dict[Path, IO[str]] = {}  # open as long as the process lives


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training is told."""

    output_dir: str
    """The run directory."""
    report_to: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers of the numbers, images and histograms; metrics.jsonl holds the numbers anyway."""
    seed: int = 0


def open(
    path: str | Path,
    settings: Any = None,
    *,
    seed: int = 0,
    ignore: Collection[str] = (),
    report_to: Sequence[TrackerName] = ("tensorboard",),
) -> "Run":
    """Take the folder of a run, to begin it, to resume it, or to find it finished.

    What killed processes left in it is removed. Nothing is recorded before `Run.begin`, so a
    finished run stays as it is. `settings` is the resolved configuration, None where another
    folder's decides; fields in `ignore` decide nothing here. `report_to` names the trackers.

    Raises ValueError when another process works in the folder, when it holds results of other
    settings, naming the differences, or when the package of a tracker is not installed.
    """
    quiet_libraries()
    require_trackers(report_to)
    run = Run(Path(path), settings, seed, report_to)
    hold_folder(run.path)
    if is_main_process():
        for folder in (run.path, *run.path.glob("**/samples")):
            remove_leftovers(folder, exclusive=True)
        if settings is not None and run.has_results():
            refuse_changes(run.path, changed_settings(run.path, settings, ignore))
    return run


class Run:
    """The folder of one run, see `open`. Only the main process writes."""

    def __init__(
        self, path: Path, settings: Any, seed: int, report_to: Sequence[TrackerName] = ()
    ) -> None:
        self.path, self.settings = path, settings
        self.seed, self.report_to = seed, report_to
        self._trackers: list[Tracker] | None = None
        self._reported = 0  # the trackers have these steps from an earlier launch

    def has_results(self) -> bool:
        """Whether the folder holds anything that took training time."""
        return any(next(self.path.glob(pattern), None) for pattern in _RESULTS)

    def begin(self, fingerprints: dict[str, str] | None = None) -> None:
        """Print and record this launch in `config.yaml` and, after those before, `manifest.json`.

        Raises ValueError when the folder holds results of other data or models (`fingerprints`).
        """
        if not is_main_process():
            return
        file = self.path / "manifest.json"
        launch = run_manifest(seed=self.seed, fingerprints=fingerprints)
        manifest = launch
        if file.is_file() and self.has_results():
            manifest = read_json(file)
            known = manifest["fingerprints"]
            given = launch["fingerprints"]
            others = [name for name in given if known.get(name, given[name]) != given[name]]
            changes = [f"{name} {known[name]!r} -> {given[name]!r}" for name in others]
            refuse_changes(self.path, changes)
            resumed = {key: launch[key] for key in ("command", "git_commit", "packages", "started")}
            manifest.setdefault("resumed", []).append(resumed)
        if self.settings is not None:
            text = to_yaml(self.settings)
            print(f"----- {self.path} -----\n{text}-----", flush=True)
            write_text(self.path / "config.yaml", text)
        write_json(file, manifest)
        self._trackers = start_trackers(self.report_to, self.path)  # a refused login costs no step

    def finished(self, steps: int, model: str | Path = "model") -> bool:
        """Whether the folder `model` was trained for this number of steps; prints if so."""
        if trained_steps(self.path / model) < steps:
            return False
        if is_main_process():
            print(f"{self.path / model} is finished ({steps} steps)", flush=True)
        return True

    def rewind(self, step: int) -> None:
        """Forget metrics after `step`: a resume computes these steps again."""
        if not is_main_process():
            return
        rows = read_metrics(self.path)
        self._reported = max((row["step"] for row in rows), default=0)
        rows = [row for row in rows if row["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`, and give the same numbers to the trackers."""
        if not is_main_process():
            return
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers_at(step):
            tracker.numbers(step, values)

    def log_images(self, step: int, images: dict[str, Image.Image]) -> None:
        """Give images to the trackers, by name."""
        for tracker in self._trackers_at(step):
            tracker.images(step, images)

    def log_histograms(self, step: int, samples: dict[str, np.ndarray]) -> None:
        """Give the trackers numbers to show the distribution of, by name."""
        for tracker in self._trackers_at(step):
            tracker.histograms(step, samples)

    def _trackers_at(self, step: int) -> list[Tracker]:
        if not is_main_process() or step <= self._reported:
            return []
        if self._trackers is None:
            self._trackers = start_trackers(self.report_to, self.path)
        return self._trackers

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints `step-N`, oldest first."""
        return numbered(self.path, "step")

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, or None."""
        return next(reversed(self.checkpoints()), None)

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints."""
        prune(self.checkpoints(), keep)


def kept(file: str | Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
    """The JSON object in `file`; where it is missing it is made, and written by the main process.

    Every process calls this. `settings`, which decide the value, are stored in it. Raises
    ValueError when the value in `file` was made with others, naming the differences.
    """
    file = Path(file)
    if file.is_file():
        value = read_json(file)
        remedy = "choose another output, or delete it"
        refuse_other_settings(file, value.get("settings", {}), settings, remedy)
        return value
    value = {**make(), "settings": json.loads(json.dumps(settings, default=str))}
    if is_main_process():
        write_json(file, value)
    return value


def refuse_other_settings(
    where: str | Path, recorded: dict[str, Any], settings: dict[str, Any], remedy: str
) -> None:
    """Refuse, with ValueError, settings other than those, read from JSON, that something was made
    with.
    """
    settings = json.loads(json.dumps(settings, default=str))  # tuples become lists, paths text
    changes = []
    for name in sorted({**recorded, **settings}):
        old, new = recorded.get(name), settings.get(name)
        if old != new:
            changes.append(f"{name} {old!s:.60} -> {new!s:.60}")
    if changes:
        raise ValueError(f"{where} was made with other settings ({', '.join(changes)}): {remedy}")


# ---- what made a result


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide results."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str:
    """Commit of the source tree, with `+changes` when it differs; `unknown` outside of git."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def run_manifest(
    *, seed: int | None = None, fingerprints: dict[str, str] | None = None
) -> dict[str, Any]:
    """What made a result: command, commit, packages, seed, identities of data and models."""
    return {
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "packages": package_versions(),
        "seed": seed,
        "fingerprints": fingerprints or {},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def mark_trained(model: Path, steps: int) -> None:
    """Record the steps of training in a model folder, before the folder gets its final name."""
    write_json(model / _STEPS_FILE, {"steps": steps})


def trained_steps(model: Path) -> int:
    """Steps that the model in this folder was trained for; 0 where none are recorded."""
    file = model / _STEPS_FILE
    return read_json(file)["steps"] if file.is_file() else 0


def changed_settings(folder: Path, config: Any, ignore: Collection[str] = ()) -> list[str]:
    """How `config` differs from the `config.yaml` of a folder, as `key OLD -> NEW`.

    `FREE_SETTINGS`, fields in `ignore`, keys that only one of both has, and a `max_steps` that
    grows do not count.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    left_out = dict.fromkeys(ignore)
    recorded = {**parse_yaml(file.read_text()), **left_out}
    given = {**parse_yaml(to_yaml(config)), **left_out}
    return list(_differences(recorded, given, config))


def _differences(
    recorded: dict[str, Any], given: dict[str, Any], config: Any, where: str = ""
) -> Iterator[str]:
    # A dataclass may have gained or lost a field since; in a free mapping every key counts.
    is_typed = dataclasses.is_dataclass(config)
    names = recorded.keys() & given.keys() if is_typed else recorded.keys() | given.keys()
    for name in sorted(names - FREE_SETTINGS):
        old: Any = recorded.get(name)
        new: Any = given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, getattr(config, name, None), f"{where}{name}.")
        elif old != new and not (name == "max_steps" and new > old):
            yield f"{where}{name} {old!r} -> {new!r}"


def refuse_changes(folder: Path, changes: Collection[str]) -> None:
    """Refuse, with ValueError, to go on in a folder when any setting has changed."""
    if changes:
        raise ValueError(
            f"{folder} holds results of other settings; they differ in {', '.join(changes)}: "
            "repeat the settings of its config.yaml, or set another output_dir"
        )


# ---- its folder


def hold(lock_file: Path, what: str) -> None:
    """Keep other processes from working on `what` until this one ends; ValueError if one does."""
    lock_file = lock_file.absolute()
    if lock_file in _locks:
        return
    stream = lock_file.open("a+")  # "w" would empty the note of who holds it
    try:
        # Unlike flock's, these locks end with the process, not with its workers, and NFS has them.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise ValueError(f"{what} is in use by {holder}: wait, or set another output") from None
        # Some cluster file systems have no locks; there two launches go unnoticed.
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {platform.node()}\n")
    stream.flush()
    _locks[lock_file] = stream


def hold_folder(folder: str | Path) -> None:
    """Make the folder of a launch, and keep other launches out of it, see `hold`."""
    if is_main_process():
        Path(folder).mkdir(parents=True, exist_ok=True)
        hold(Path(folder) / ".lock", str(folder))


def prune(paths: Sequence[Path], keep: int) -> None:
    """Delete all but the last `keep` folders."""
    for path in paths[:-keep]:
        discard(path)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` in a run directory, without a last line that a crash cut short."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for number, line in raw_lines(path) if path.exists() else ():
        try:
            rows.append(parse_json(line, f"{path}, line {number}"))
        except ValueError:
            break
    return rows


# ---- for people


def format_duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def quiet_libraries() -> None:
    """Keep the progress bars and load reports of transformers out of a job's own log lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
