"""A run directory: resolved config, manifest, metrics as JSON lines and TensorBoard events, checkpoints."""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vqrae.common.config import to_yaml
from vqrae.common.distributed import is_main_process
from vqrae.common.files import parse_json, raw_lines, write_json, write_text

TRACKED_PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "deepspeed", "numpy", "lmms-eval")


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


def run_manifest(*, seed: int | None = None, fingerprints: dict[str, str] | None = None) -> dict[str, Any]:
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
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def quiet_libraries() -> None:
    """Keep the progress bars and load reports of transformers out of a job's own log lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class RunDirectory:
    """Folder of one run. Only the main process writes.

    Args:
        path: the folder, made when missing.
        config: the resolved configuration (a dataclass), written as `config.yaml` and printed.
        fingerprints: identity of data and tokenizer, for `manifest.json`.
    """

    def __init__(
        self, path: str | Path, config: Any = None, *, seed: int = 0, fingerprints: dict[str, str] | None = None
    ) -> None:
        quiet_libraries()
        self.path = Path(path)
        self._events: Any = None
        self._started = time.time()
        if not is_main_process():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if config is not None:
            text = to_yaml(config)
            print(f"----- {self.path} -----\n{text}-----", flush=True)
            write_text(self.path / "config.yaml", text)
        write_json(self.path / "manifest.json", run_manifest(seed=seed, fingerprints=fingerprints))

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
            shutil.rmtree(path)


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
