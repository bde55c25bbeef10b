"""Kill every job again and again, repeat its command, and compare with an untouched run.

    bash scripts/check_kill.sh [jobs=NAME,NAME] [kills=N] [seed=S] [output=DIR]

A job is killed (SIGKILL, as in a power cut or by the kernel when memory is full) right before one
of the file-system events of the untouched run: a file opened for writing, a rename, a removal, a
new folder. Every fourth time it is killed at a random moment instead, which hits writes that Python
does not see. Of several processes one is killed, and then the others, as a launcher does. The same
command must then end without an error, with the same bytes in everything that it makes, and leave
nothing else. The models are tiny and random: what is tested is how they are kept.
"""

import hashlib
import importlib
import os
import random
import shlex
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from vqrae.common.cli import parse
from vqrae.common.config import ConfigError, build_config, did_you_mean, read_yaml
from vqrae.common.errors import exit_code, run_main
from vqrae.common.files import markdown_table, write_json
from vqrae.common.run import read_metrics

HANG_SECONDS = 300  # far longer than any of the tiny jobs takes
COLUMNS = ("kills", "equal", "errors", "hangs", "different", "lost", "left over")
# Ends of the names of files that hold paths, dates and processes: they must exist, not be equal.
PROVENANCE = (".lock", "config.yaml", "manifest.json", "training_args.bin")
Hook = Callable[[str, tuple], None]


@dataclass(frozen=True, kw_only=True)
class CheckKillConfig:
    """Kill jobs at file-system events, and see whether the same command repairs everything."""

    jobs: str = "all"
    """Names joined by commas, or all."""
    kills: int = 8
    """Of each job."""
    seed: int = 0
    """Of the moments."""
    output: str = "runs/check_kill"
    """Folder of the tiny models, of what the last failures left, and of `report.json`."""


# ---- the jobs


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that is killed, from `check_kill.yaml`."""

    command: str
    """A module of vqrae, and the arguments of its `main`."""
    more: str = ""
    """Further arguments."""
    needs: tuple[str, ...] = ()
    """Jobs that make the models that it starts from, in order."""
    processes: int = 1

    @property
    def module(self) -> str:
        return f"vqrae.{self.command.split()[0]}"

    @property
    def arguments(self) -> list[str]:
        return [*shlex.split(self.command)[1:], *self.more.split()]


def all_jobs(parts: Path) -> dict[str, Job]:
    """Every job by name, with its models in `parts`."""
    jobs = {}
    described = read_yaml(Path(__file__).with_suffix(".yaml"))
    for name, values in described.items():
        values = {**described.get(values.pop("like", ""), {}), **values}
        values["command"] = values["command"].replace("PARTS", str(parts))
        jobs[name] = build_config(Job, values, source=name)
    return jobs


def make_parts(parts: Path, wanted: Collection[str]) -> None:
    """Make the wanted models, each by the job of its name, and questions and prompts."""
    parts.mkdir(parents=True, exist_ok=True)
    jobs = all_jobs(parts)
    for name in ("tokenizer", "llm", "codes", "llava", "generator"):
        log = parts / f"{name}.log"
        if name in wanted and end(start(jobs[name], parts / name, log)) != "0":
            raise RuntimeError(f"{name} cannot be made: {log.read_text()[-2000:]}")
    lines = [f'{{"id": {i}, "question": "how many things are there ?"}}\n' for i in range(8)]
    (parts / "questions.jsonl").write_text("".join(lines))
    (parts / "prompts.txt").write_text("a photo of a red circle\na photo of two stars\n")


# ---- processes


class Events:
    """An audit hook that counts and records the changes of a folder.

    It kills its process before change number `kill_at`.
    """

    def __init__(
        self, folder: Path, *, kill_at: int | None = None, record: Path | None = None
    ) -> None:
        self.folder, self.kill_at = str(folder), kill_at
        self.count = 0
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if record else None

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.is_change(event, arguments):
            return
        self.count += 1
        if self.record is not None:
            name = os.fsdecode(arguments[0]).replace(self.folder, "")
            os.write(self.record, f"{event} {name}\n".encode())
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_change(self, event: str, arguments: tuple) -> bool:
        """Whether an audit event changes the folder."""
        path = arguments[0] if arguments else None
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(os.fspath(path))
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return False
        elif event in ("os.remove", "os.rmdir") and not os.path.isabs(name):
            return True  # `shutil.rmtree` removes by names relative to an open folder
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return False
        return os.path.abspath(name).startswith(self.folder)


def start(job: Job, output: Path, log: Path, hooks: Sequence[Hook] = ()) -> list[ForkProcess]:
    """Fork the processes of a job, which have imported everything; `hooks` are audit hooks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(job.processes):
        hook = hooks[rank] if hooks else None
        processes.append(ForkProcess(target=work, args=(job, output, log, rank, port, hook)))
        processes[-1].start()
    return processes


def work(job: Job, output: Path, log: Path, rank: int, port: int, hook: Hook | None) -> None:
    """Run one process of a job in this one, and end it with the exit code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if job.processes > 1:
        world = str(job.processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world)
        os.environ.update(LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=str(port))
    arguments = [word.replace("OUTPUT", str(output)) for word in job.arguments]
    sys.argv = [job.module, *arguments]
    main: Any = importlib.import_module(job.module).main
    if hook is not None:
        sys.addaudithook(hook)  # for good: no hook can be removed
    sys.exit(exit_code(lambda: main(arguments), job.module))


def end(processes: list[ForkProcess], *, kill_after: float | None = None) -> str:
    """Wait for processes: "0", "killed", "hang", or the exit code of the first that failed.

    As a launcher does, it ends the others when one fails; after `kill_after` seconds it kills all.
    """
    deadline = time.monotonic() + (HANG_SECONDS if kill_after is None else kill_after)
    result = "0"
    while True:
        are_alive = [process.is_alive() for process in processes]
        codes = [process.exitcode for process in processes if process.exitcode]
        if result == "0" and codes:
            result = "killed" if codes[0] == -signal.SIGKILL else str(codes[0])
        elif result == "0" and any(are_alive) and time.monotonic() > deadline:
            result = "hang" if kill_after is None else "killed"
        if not any(are_alive):
            return result
        if result != "0":
            for process in processes:
                process.kill()
        time.sleep(0.005)


# ---- what is compared


def result_of(output: Path) -> dict[str, str]:
    """Everything that a job made: digests of files, losses of the metrics, checkpoints.

    Not the previews: a tokenizer writes that of a step after its checkpoint, and a kill between the
    two costs it.
    """
    found: dict[str, str] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        is_kept = [part.startswith(("checkpoint-", "step-")) for part in name.parts]
        if "samples" in name.parts or "events" in name.parts or is_temporary(path):
            continue
        if any(is_kept):
            found[str(Path(*name.parts[: is_kept.index(True) + 1]))] = "checkpoint"
        elif path.name == "metrics.jsonl":
            rows = {row["step"]: row["loss"] for row in read_metrics(path.parent) if "loss" in row}
            found[str(name)] = str(sorted(rows.items()))
        elif path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(name)] = "" if path.name.endswith(PROVENANCE) else digest
    return found


def is_temporary(path: Path) -> bool:
    """Whether a name says that the file is not finished."""
    is_hidden = path.name.startswith(".") and not path.name.endswith(".lock")
    return is_hidden or path.name.endswith(".tmp")


def judge(status: str, output: Path, expected: dict[str, str]) -> dict[str, list[str]]:
    """Columns of the report that a restart counts in, with the evidence; `equal` if all is well."""
    found = result_of(output)
    different = [name for name in found if found[name] != expected.get(name)]
    if status != "0":
        verdict = {"hangs" if status == "hang" else "errors": [status]}
    elif missing := sorted(expected.keys() - found.keys()):
        verdict = {"lost": missing}
    else:
        verdict = {"different": different} if different else {"equal": []}
    left_over = [str(path.relative_to(output)) for path in output.rglob("*") if is_temporary(path)]
    return verdict | ({"left over": left_over} if left_over else {})


# ---- the campaign


def campaign(
    name: str, job: Job, folder: Path, *, kills: int, seed: int = 0
) -> tuple[Counter[str], list[str]]:
    """Kill a job in a fresh folder and restart it, `kills` times; counts, and what went wrong."""
    output, log = folder / "output", folder / "log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records = [folder / f"events-{rank}" for rank in range(job.processes)]
    begin = time.monotonic()
    if end(start(job, output, log, [Events(output, record=record) for record in records])) != "0":
        text = log.read_text(errors="replace")[-1000:]
        return Counter(errors=1), [f"the untouched run failed: {text}"]
    seconds = time.monotonic() - begin
    expected = result_of(output)
    events = [record.read_text().splitlines() for record in records]
    moments = random.Random(f"{name} {seed}")
    counts: Counter[str] = Counter()
    notes = []
    for trial in range(kills):
        shutil.rmtree(output)
        rank = trial % job.processes
        if trial % 4 == 3 or not events[rank]:
            after = moments.uniform(0.1, seconds)
            where = f"after {after:.2f} s"
            killed = end(start(job, output, log), kill_after=after)
        else:
            at = moments.randint(1, len(events[rank]))
            where = f"in process {rank} before {events[rank][at - 1]}"
            hooks = [Events(output) for _ in records]
            hooks[rank].kill_at = at
            killed = end(start(job, output, log, hooks))
        counts.update(kills=killed == "killed", hangs=killed == "hang")
        again = folder / f"log-{trial}"
        verdict = judge(end(start(job, output, again)), output, expected)
        counts.update(verdict.keys())
        if verdict.keys() != {"equal"}:
            last = again.read_text(errors="replace").strip().rpartition("\n")[2]
            notes.append(f"killed {where}: {verdict}; {last[:200]}")
            keep = folder.with_name(f"{folder.name} {trial}")
            shutil.copytree(folder, keep, dirs_exist_ok=True, symlinks=True)
    return counts, notes


def table(outcomes: dict[str, Counter[str]]) -> str:
    """The counts as a Markdown table, with their sum."""
    total: Counter[str] = sum(outcomes.values(), Counter())
    rows = []
    for name, counts in {**outcomes, "**all**": total}.items():
        rows.append([name, *(str(counts[column]) for column in COLUMNS)])
    return "\n".join(markdown_table(["job", *COLUMNS], rows))


def prepare_process(jobs: Collection[Job]) -> None:
    """Import what all processes need, with one thread: a process with more cannot be forked."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    commands = {"vqrae.scripts.commands.chat", "vqrae.scripts.commands.generate"}
    for module in {job.module for job in jobs} | commands:
        importlib.import_module(module)


def main(argv: list[str] | None = None) -> int:
    config = parse(CheckKillConfig, argv)
    output = Path(config.output).absolute()
    jobs = all_jobs(output / "parts")
    names = list(jobs) if config.jobs == "all" else config.jobs.split(",")
    for name in names:
        if name not in jobs:
            raise ConfigError(f"jobs: there is no {name!r}. {did_you_mean(name, jobs)}")
    prepare_process(jobs.values())
    wanted: set[str] = set().union(*(jobs[name].needs for name in names))
    make_parts(output / "parts", wanted)
    outcomes: dict[str, Counter[str]] = {}
    report: dict[str, Any] = {}
    for name in names:
        begin = time.monotonic()
        folder = output / "jobs" / name
        outcomes[name], notes = campaign(
            name, jobs[name], folder, kills=config.kills, seed=config.seed
        )
        summary = f"{outcomes[name]['kills']} kills, {outcomes[name]['equal']} equal"
        print(
            f"{name}: {summary}, {time.monotonic() - begin:.0f} s", *notes, sep="\n  ", flush=True
        )
        report[name] = {**outcomes[name], "notes": notes}
        write_json(output / "report.json", {"jobs": report})
    print(table(outcomes))
    return int(any(job["notes"] for job in report.values()))


if __name__ == "__main__":
    run_main(main)
