"""A run directory: resolved config, manifest, metrics as JSON lines and TensorBoard events, checkpoints.

It belongs to one process (or launch) at a time, and to the settings that its contents were made with: a relaunch resumes
with the same ones and is refused with others, so `config.yaml` and `manifest.json` always tell what made the model.
"""

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from vqrae.common.config import parse_yaml, to_yaml
from vqrae.common.distributed import is_main_process
from vqrae.common.files import parse_json, raw_lines, read_json, write_json, write_text

# Fields of any configuration that may change between the launches of one run: they decide how it is computed and what it
# reports, not what comes out. The tokenizer may move; its fingerprint is compared.
FREE_SETTINGS = frozenset(
    {
        "output_dir",
        "stage",
        "dry_run",
        "tokenizer",
        "micro_batch_size",
        "attention",
        "attn_implementation",
        "compile",
        "activation_checkpointing",
        "gradient_checkpointing",
        "num_workers",
        "dataloader_num_workers",
        "perceptual_weights",
        "save_steps",
        "save_total_limit",
        "keep_checkpoints",
        "log_steps",
        "logging_steps",
        "sample_steps",
        "max_nonfinite_steps",
    }
)
# What a run keeps of its work, in its folder or in that of a stage.
_RESULTS = ("model", "checkpoint-*", "step-*", "*/model", "*/checkpoint-*", "*/step-*")
_STEPS_FILE = "training.json"
_locks: dict[Path, IO[str]] = {}  # open as long as the process lives

TRACKED_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "deepspeed",
    "numpy",
    "lmms-eval",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide results."""
    versions = {"python": platform.python_version()}
    for name in TRACKED_PACKAGES:
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
    """How a result came about: command, commit, package versions, seed, identities of data and models."""
    return {
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "packages": package_versions(),
        "seed": seed,
        "fingerprints": fingerprints or {},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def format_duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h{minutes:02d}m"
        if hours
        else f"{minutes}m{seconds:02d}s"
        if minutes
        else f"{seconds}s"
    )


def quiet_libraries() -> None:
    """Keep the progress bars and load reports of transformers out of a job's own log lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def mark_trained(model: Path, steps: int) -> None:
    """Record in a model folder for how many steps it was trained, before the folder gets its name."""
    write_json(model / _STEPS_FILE, {"steps": steps})


def trained_steps(model: Path) -> int:
    """Steps that the model in this folder was trained for; 0 where there is none, or none that says so."""
    file = model / _STEPS_FILE
    return read_json(file)["steps"] if file.is_file() else 0


def hold(lock_file: Path, what: str) -> None:
    """Keep other processes from working on `what` until this one ends.

    Raises:
        ValueError: when another process holds it.
    """
    lock_file = lock_file.absolute()
    if lock_file in _locks:
        return
    stream = lock_file.open("a+")
    try:
        # Unlike flock's, these locks do not live on in the workers of a killed process, and they work on NFS.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise ValueError(
                f"{what} is in use by {holder}: wait until it ends, or set another output"
            ) from None
        # Some file systems of clusters have no locks; there two launches go unnoticed.
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {platform.node()}\n")
    stream.flush()
    _locks[lock_file] = stream


def changed_settings(folder: Path, config: Any, ignore: Collection[str] = ()) -> list[str]:
    """How `config` differs from what is recorded in the `config.yaml` of a folder, as `key OLD -> NEW`.

    Fields of `FREE_SETTINGS`, keys that one of both does not know, and a `max_steps` that grows are no differences.

    Args:
        ignore: names of further fields of `config` that do not matter here.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    recorded, given = parse_yaml(file.read_text()), parse_yaml(to_yaml(config))
    left_out = dict.fromkeys(ignore)
    return list(_differences({**recorded, **left_out}, {**given, **left_out}, config))


def _differences(
    recorded: dict[str, Any], given: dict[str, Any], config: Any, where: str = ""
) -> Iterator[str]:
    known = (
        recorded.keys() & given.keys()
        if dataclasses.is_dataclass(config)
        else recorded.keys() | given.keys()
    )
    for name in sorted(known - FREE_SETTINGS):
        old: Any = recorded.get(name)
        new: Any = given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, getattr(config, name, None), f"{where}{name}.")
        elif old != new and not (name == "max_steps" and new > old):
            yield f"{where}{name} {old!r} -> {new!r}"


def refuse_changes(folder: Path, changes: Collection[str]) -> None:
    """Refuse to go on in a folder with other settings.

    Raises:
        ValueError: naming what changed, when anything did.
    """
    if changes:
        raise ValueError(
            f"{folder} holds results of other settings; they differ in {', '.join(changes)}: "
            "repeat the settings of its config.yaml, or set another output_dir"
        )


def open(
    path: str | Path, settings: Any = None, *, seed: int = 0, ignore: Collection[str] = ()
) -> "Run":
    """Take the folder of a run, to begin it, to resume it, or to find it finished.

    Left-overs of killed processes are removed. Nothing is recorded before `Run.begin`, so a finished run stays as it is.

    Args:
        path: the folder, made when missing. Nothing else may work in it until this process ends.
        settings: the resolved configuration (a dataclass); None where another folder's decides.
        ignore: names of fields of `settings` that decide nothing in this folder.

    Raises:
        ValueError: when another process works in the folder, or when it holds results of other settings, naming the differences.
    """
    return RunDirectory(path, settings, seed=seed, ignore=ignore)


def kept(file: str | Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
    """The JSON object in `file`, which is made and written (by the main process) where it is missing.

    Every process calls this.

    Args:
        settings: what decides the value; stored in it under the key `settings`.
        make: computes the value.

    Raises:
        ValueError: when the value in `file` was made with other settings, naming the differences.
    """
    file, settings = Path(file), json.loads(json.dumps(settings, default=str))
    if file.is_file():
        value = read_json(file)
        recorded = value.get("settings", {})
        names = sorted(
            name for name in {**recorded, **settings} if recorded.get(name) != settings.get(name)
        )
        changes = ", ".join(
            f"{name} {recorded.get(name)!s:.60} -> {settings.get(name)!s:.60}" for name in names
        )
        if changes:
            raise ValueError(
                f"{file} was made with other settings ({changes}): choose another output, or delete it"
            )
        return value
    value = {**make(), "settings": settings}
    if is_main_process():
        write_json(file, value)
    return value


class RunDirectory:
    """Folder of one run. Only the main process writes.

    Making one takes the folder: nothing else may work in it until this process ends. Nothing is recorded before `begin`,
    so a finished run stays as it is.

    Args:
        path: the folder, made when missing.
        config: the resolved configuration (a dataclass).
        ignore: names of fields of `config` that decide nothing in this folder.

    Raises:
        ValueError: when another process works in the folder, or when it holds results of other settings.
    """

    def __init__(
        self, path: str | Path, config: Any = None, *, seed: int = 0, ignore: Collection[str] = ()
    ) -> None:
        quiet_libraries()
        self.path, self.config, self.seed = Path(path), config, seed
        self._events: Any = None
        if not is_main_process():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        hold(self.path / ".lock", str(self.path))
        remove_temporaries(self.path)
        if config is not None and self.has_results():
            refuse_changes(self.path, changed_settings(self.path, config, ignore))

    def has_results(self) -> bool:
        """Whether there is anything in the folder that a training took time for."""
        return any(True for pattern in _RESULTS for _ in self.path.glob(pattern))

    def begin(self, fingerprints: dict[str, str] | None = None) -> None:
        """Print and record this launch in `config.yaml` and `manifest.json`, which keeps all launches since the first.

        Args:
            fingerprints: identity of data and models.

        Raises:
            ValueError: when the folder holds results of other data or models.
        """
        if not is_main_process():
            return
        file, launch = (
            self.path / "manifest.json",
            run_manifest(seed=self.seed, fingerprints=fingerprints),
        )
        manifest = launch
        if file.is_file() and self.has_results():
            manifest = read_json(file)
            known, found = manifest["fingerprints"], launch["fingerprints"]
            others = {name: new for name, new in found.items() if known.get(name, new) != new}
            refuse_changes(
                self.path, [f"{name} {known[name]!r} -> {new!r}" for name, new in others.items()]
            )
            resumed = {key: launch[key] for key in ("command", "git_commit", "packages", "started")}
            manifest.setdefault("resumed", []).append(resumed)
        if self.config is not None:
            text = to_yaml(self.config)
            print(f"----- {self.path} -----\n{text}-----", flush=True)
            write_text(self.path / "config.yaml", text)
        write_json(file, manifest)

    def finished(self, steps: int, model: str | Path = "model") -> bool:
        """Whether the run holds a model that was trained for this number of steps; says so.

        Args:
            model: where the model is, relative to the run.
        """
        if trained_steps(self.path / model) < steps:
            return False
        if is_main_process():
            print(f"{self.path / model} is finished ({steps} steps)", flush=True)
        return True

    # ---- metrics

    def rewind(self, step: int) -> None:
        """Forget metrics after `step`: an interrupted run logged steps that a resume computes again."""
        if not is_main_process():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl` and the same numbers to TensorBoard."""
        if not is_main_process():
            return
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path / "events"))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    # ---- checkpoints

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in self.path.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, or None."""
        found = self.checkpoints()
        return found[-1] if found else None

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints."""
        for path in self.checkpoints()[:-keep]:
            discard(path)


Run = RunDirectory


def discard(folder: Path) -> None:
    """Remove a folder under another name, so that one that is half removed is not taken for whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left half-written; the caller holds the folder."""
    for path in folder.glob(".*"):
        if path.name.endswith((".tmp", ".staging")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` in a run directory; a last line cut short by a crash is left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for number, line in raw_lines(path) if path.exists() else ():
        try:
            rows.append(parse_json(line, f"{path}, line {number}"))
        except ValueError:
            break
    return rows
