"""Kill every job again and again, run the same command, and compare with a run that nobody touched.

    bash scripts/check_kill.sh [jobs=NAME,NAME] [kills=N] [seed=S] [output=DIR]

A job is killed (SIGKILL, as a power cut or the kernel's memory killer does) in front of one of the file-system events that
the untouched run went through: a file opened for writing, a rename, a removal, a new folder; every fourth time at a random
moment instead, which falls into writes that Python does not see. Of several processes one is killed at an event, and the
others as a launcher does it. Then the same command must end without an error, with the same bytes in everything that it
makes, and with nothing left over. The models are tiny and random: what is tested is how they are kept.
"""

import hashlib
import importlib
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vqrae.common.cli import parse
from vqrae.common.config import did_you_mean
from vqrae.common.errors import exit_code, run_main
from vqrae.common.files import write_json
from vqrae.common.run import read_metrics

HANG_SECONDS = 300
LLM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
ENCODER = (
    "{model_type: siglip_vision_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,"
    " image_size: 32, patch_size: 8, vision_use_head: false}"
)
PROVENANCE = (
    ".lock",
    "config.yaml",
    "manifest.json",
    "training_args.bin",
)  # ends of names: paths, dates, processes


@dataclass(frozen=True)
class Job:
    """A command that is killed.

    Attributes:
        module: whose `main` takes `arguments` and OUTPUT (a word in them).
        processes: that work on it together.
        needs: the tiny models that it starts from, by the names of the jobs that make them, in order.
    """

    module: str
    arguments: list[str]
    processes: int = 1
    needs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of one job.

    Attributes:
        errors: restarts that failed.
        hangs: launches that did not end.
        different: restarts that ended with other bytes.
        lost: restarts that ended without something that belongs to the result.
        left_over: restarts that left temporary files.
    """

    kills: int = 0
    equal: int = 0
    errors: int = 0
    hangs: int = 0
    different: int = 0
    lost: int = 0
    left_over: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CheckKillConfig:
    """Kill jobs at file-system events, and see whether the same command repairs everything."""

    jobs: str = "all"
    """Names with commas between them, or all."""
    kills: int = 8
    """Of each job."""
    seed: int = 0
    """Of the moments."""
    output: str = "runs/check_kill"
    """Folder of the tiny models, of what the last failures left, and of `report.json`."""


def steps(prefix: str, count: int) -> list[str]:
    """Overrides of a `Trainer` job for a run of a few steps with a checkpoint at each."""
    sizes = {
        "max_steps": count,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "save_steps": 1,
        "logging_steps": 1,
    }
    return [f"{prefix}.{key}={value}" for key, value in sizes.items()]


def all_jobs(parts: Path) -> dict[str, Job]:
    """Every job by name, for tiny models in `parts` (see `make_parts`)."""
    tokenizer, llm = f"tokenizer={parts / 'tokenizer'}", f"llm={parts / 'llm'}"
    sizes = [
        f"{part}.{key}={value}"
        for part in ("vision", "text")
        for key, value in list(LLM.items())[:2]
    ]
    encoder = [
        "tiny_encoder",
        "output_dir=OUTPUT",
        *sizes,
        "vision.image_size=32",
        "text.projection_size=32",
    ]
    encoder += steps("optimization", 3)
    language_model = [
        "tiny_llm",
        "output_dir=OUTPUT",
        *(f"model.{k}={v}" for k, v in LLM.items()),
        *steps("optimization", 3),
    ]
    llava = ["tiny", "output_dir=OUTPUT", tokenizer, llm, *steps("pretrain", 2), *steps("sft", 3)]
    small = [f"model.llm_config.{key}={value}" for key, value in LLM.items()]
    generator = [
        "tiny",
        "output_dir=OUTPUT",
        tokenizer,
        f"data={parts / 'codes'}",
        *small,
        *steps("optimization", 3),
    ]
    codes = ["tiny", "output_dir=OUTPUT", tokenizer, "size=40", "shard_size=8", "batch_size=4"]
    ask = [
        "chat",
        "--model",
        str(parts / "llava"),
        "--questions",
        str(parts / "questions.jsonl"),
        "--batch-size",
        "2",
    ]
    draw = [
        "generate",
        "--model",
        str(parts / "generator"),
        "--prompts-file",
        str(parts / "prompts.txt"),
        "--batch-size",
        "2",
    ]
    training, generation, cli = (
        "vqrae.understanding.train",
        "vqrae.generation.train",
        "vqrae.scripts.cli",
    )
    jobs = {
        "encoder": Job("vqrae.quickstart.pretrain_encoder", encoder),
        "tokenizer": Job("vqrae.tokenizer.train", tokenizer_arguments()),
        "llm": Job("vqrae.quickstart.train_llm", language_model),
        "llava": Job(training, llava, needs=("tokenizer", "llm")),
        "codes": Job("vqrae.generation.extract_codes", codes, needs=("tokenizer",)),
        "generator": Job(generation, generator, needs=("tokenizer", "codes")),
        "answers": Job(
            cli,
            [*ask, "--max-new-tokens", "4", "--out", "OUTPUT/answers.jsonl"],
            needs=("tokenizer", "llm", "llava"),
        ),
        "generate": Job(
            cli,
            [*draw, "--num-images", "2", "--out", "OUTPUT"],
            needs=("tokenizer", "codes", "generator"),
        ),
    }
    two = {
        f"{name}_x2": replace(jobs[name], processes=2) for name in ("codes", "tokenizer", "llava")
    }
    for name, zero in (
        ("llava", ["pretrain.zero=2", "sft.zero=3"]),
        ("generator", ["optimization.zero=1"]),
    ):
        two[f"{name}_x2_zero"] = replace(
            jobs[name], arguments=[*jobs[name].arguments, *zero], processes=2
        )
    return jobs | two


def tokenizer_arguments() -> list[str]:
    """Both stages of a tokenizer of 16 codes an image."""
    model = [
        "model.encoder=",
        f"model.encoder_config={ENCODER}",
        "model.codebook_size=64",
        "model.codebook_dim=32",
    ]
    each = {"global_batch_size": 2, "micro_batch_size": 1, "bypass_steps": 0, "revival_interval": 2}
    stages = [f"stage{number}.{key}={value}" for number in (1, 2) for key, value in each.items()]
    counts = [
        "stage1.max_steps=2",
        "stage2.max_steps=3",
        "save_steps=1",
        "log_steps=1",
        "sample_steps=2",
    ]
    return ["tiny", "output_dir=OUTPUT", *model, *stages, *counts]


def make_parts(parts: Path, wanted: Collection[str]) -> None:
    """Make those of the tiny models that are wanted, each by the job of its name, and questions and prompts."""
    parts.mkdir(parents=True, exist_ok=True)
    jobs = all_jobs(parts)
    for name in ("tokenizer", "llm", "codes", "llava", "generator"):
        log = parts / f"{name}.log"
        if name in wanted and launch(jobs[name], parts / name, log) != "0":
            raise RuntimeError(f"{name} cannot be made: {log.read_text()[-2000:]}")
    lines = [f'{{"id": {i}, "question": "how many things are there ?"}}\n' for i in range(8)]
    (parts / "questions.jsonl").write_text("".join(lines))
    (parts / "prompts.txt").write_text("a photo of a red circle\na photo of two stars\n")


# ------------------------------------------------------------------------------------------- processes


class Events:
    """Counts the file-system events of a process below a folder, and kills it in front of one of them.

    Args:
        kill_at: number of the event, from 1; None only counts.
        record: file that gets a line for each event.
    """

    def __init__(
        self, folder: Path, *, kill_at: int | None = None, record: Path | None = None
    ) -> None:
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0
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
        """Whether an audit event changes the folder. `shutil.rmtree` removes by names relative to an open folder."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return False
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path = arguments[0]
        else:
            return False
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(os.fspath(path))
        relative = event in ("os.remove", "os.rmdir") and not os.path.isabs(name)
        return relative or os.path.abspath(name).startswith(self.folder)


def start(
    job: Job, output: Path, log: Path, hooks: Sequence[Callable[[str, tuple], None] | None] = ()
) -> list[int]:
    """Fork the processes of a job, which then need no time for imports; `hooks` are the audit hooks of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job.processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            os._exit(_work(job, output, log, rank, port, hooks[rank] if hooks else None))
        finally:
            os._exit(70)
    return children


def _work(
    job: Job,
    output: Path,
    log: Path,
    rank: int,
    port: int,
    hook: Callable[[str, tuple], None] | None,
) -> int:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if job.processes > 1:
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": job.processes,
            "LOCAL_WORLD_SIZE": job.processes,
        }
        os.environ.update(
            {key: str(value) for key, value in numbers.items()},
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
    arguments = [argument.replace("OUTPUT", str(output)) for argument in job.arguments]
    sys.argv = [job.module, *arguments]
    main: Any = importlib.import_module(job.module).main
    if hook is not None:
        sys.addaudithook(hook)
    try:
        return exit_code(lambda: main(arguments), job.module)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        if isinstance(sys.exc_info()[1], Exception):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()


def end(children: list[int], *, kill_after: float | None = None) -> str:
    """Wait for processes: "0" when all ended well, "killed", "hang", or the exit code of the first that failed.

    As a launcher does, it ends the others when one fails.

    Args:
        kill_after: seconds until all are killed.
    """
    begun, result, running = time.monotonic(), "0", list(children)
    while running:
        for child in list(running):
            found, status = os.waitpid(child, os.WNOHANG)
            if not found:
                continue
            running.remove(child)
            code = os.waitstatus_to_exitcode(status)
            if code and result == "0":
                result = "killed" if code == -signal.SIGKILL else str(code)
                _kill(running)
        passed = time.monotonic() - begun
        if (
            result == "0"
            and running
            and passed > (HANG_SECONDS if kill_after is None else kill_after)
        ):
            result = "hang" if kill_after is None else "killed"
            _kill(running)
        time.sleep(0.005)
    return result


def _kill(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)


def launch(job: Job, output: Path, log: Path) -> str:
    """Run a job to its end, see `end`."""
    return end(start(job, output, log))


# ------------------------------------------------------------------------------------------- what is compared


def result_of(output: Path) -> dict[str, str]:
    """Everything that a job made, by name: digests of the files, the losses of the metrics, names of the checkpoints.

    Previews are left out: a tokenizer writes that of a step behind its checkpoint, and a kill between the two costs it.
    """
    found: dict[str, str] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if "samples" in name.parts:
            continue
        kept = next(
            (part for part in name.parts if part.startswith(("checkpoint-", "step-"))), None
        )
        if kept is not None:
            found[str(Path(*name.parts[: name.parts.index(kept) + 1]))] = "checkpoint"
        elif path.name == "metrics.jsonl":
            rows = {row["step"]: row["loss"] for row in read_metrics(path.parent) if "loss" in row}
            found[str(name)] = str(sorted(rows.items()))
        elif path.is_file() and "events" not in name.parts and not is_temporary(path):
            is_provenance = path.name.endswith(PROVENANCE)
            found[str(name)] = (
                "" if is_provenance else hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


def is_temporary(path: Path) -> bool:
    """Whether a name says that the file is not finished."""
    return (path.name.startswith(".") and not path.name.endswith(".lock")) or path.name.endswith(
        ".tmp"
    )


def judge(
    outcome: Outcome, status: str, where: str, output: Path, expected: dict[str, str], log: Path
) -> bool:
    """Count one restart, and say whether all was well."""
    left_over = [str(path.relative_to(output)) for path in output.rglob("*") if is_temporary(path)]
    found = result_of(output)
    missing = sorted(expected.keys() - found.keys())
    different = (
        sorted(name for name in found if found[name] != expected.get(name)) if not missing else []
    )
    if status == "hang":
        outcome.hangs += 1
    elif status != "0":
        outcome.errors += 1
    elif missing:
        outcome.lost += 1
    elif different:
        outcome.different += 1
    else:
        outcome.equal += 1
    outcome.left_over += bool(left_over)
    well = status == "0" and not (missing or different or left_over)
    if not well:
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        problems = f"status {status}, missing {missing[:3]}, different {different[:3]}, left over {left_over[:3]}"
        outcome.notes.append(f"killed {where}: {problems}; {last[:200]}")
    return well


# ------------------------------------------------------------------------------------------- the campaign


def campaign(name: str, job: Job, folder: Path, *, kills: int, seed: int = 0) -> Outcome:
    """Kill a job `kills` times, each time in a fresh folder, and restart it."""
    output, log, outcome = folder / "output", folder / "log", Outcome()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records = [folder / f"events-{rank}" for rank in range(job.processes)]
    begun = time.monotonic()
    status = end(start(job, output, log, [Events(output, record=record) for record in records]))
    seconds = time.monotonic() - begun
    if status != "0":
        outcome.notes.append(f"the untouched run failed: {log.read_text(errors='replace')[-1000:]}")
        outcome.errors += 1
        return outcome
    expected, events = result_of(output), [record.read_text().splitlines() for record in records]
    moments = random.Random(f"{name} {seed}")
    for trial in range(kills):
        shutil.rmtree(output)
        for file in folder.glob("log*"):
            file.unlink()
        rank = trial % job.processes
        if trial % 4 == 3 or not events[rank]:
            after = moments.uniform(0.1, seconds)
            where, killed = f"after {after:.2f} s", end(start(job, output, log), kill_after=after)
        else:
            at = moments.randint(1, len(events[rank]))
            where = f"in process {rank} before {events[rank][at - 1]}"
            hooks = [
                Events(output, kill_at=at if each == rank else None)
                for each in range(job.processes)
            ]
            killed = end(start(job, output, log, hooks))
        outcome.kills += killed == "killed"
        outcome.hangs += killed == "hang"
        again = folder / "log-again"
        status = launch(job, output, again)
        if not judge(outcome, status, where, output, expected, again):
            shutil.copytree(
                folder,
                folder.with_name(f"{folder.name} {trial}"),
                dirs_exist_ok=True,
                symlinks=True,
            )
    return outcome


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as a Markdown table, with their sum."""
    columns = ("kills", "equal", "errors", "hangs", "different", "lost", "left_over")
    lines = [
        f"| job | {' | '.join(columns).replace('_', ' ')} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, outcome in outcomes.items():
        lines.append(
            f"| {name} | {' | '.join(str(getattr(outcome, column)) for column in columns)} |"
        )
    sums = [sum(getattr(outcome, column) for outcome in outcomes.values()) for column in columns]
    return "\n".join([*lines, f"| **all** | {' | '.join(map(str, sums))} |"])


def prepare_process(jobs: dict[str, Job]) -> None:
    """Import once what all processes need, with one thread each: a process with more cannot be forked."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        DS_ACCELERATOR="cpu",
    )
    import torch

    torch.set_num_threads(1)
    for module in {job.module for job in jobs.values()} | {
        "vqrae.understanding.chat",
        "vqrae.generation.generator",
    }:
        importlib.import_module(module)


def main(argv: list[str] | None = None) -> int:
    config = parse(CheckKillConfig, argv)
    output = Path(config.output).absolute()
    parts, jobs = output / "parts", all_jobs(output / "parts")
    prepare_process(jobs)
    if config.jobs != "all":
        unknown = sorted(set(config.jobs.split(",")) - jobs.keys())
        if unknown:
            raise ValueError(
                f"got jobs={config.jobs}: there is no {unknown[0]!r}. {did_you_mean(unknown[0], jobs)}"
            )
        jobs = {name: jobs[name] for name in config.jobs.split(",")}
    make_parts(parts, {part for job in jobs.values() for part in job.needs})
    outcomes: dict[str, Outcome] = {}
    for name, job in jobs.items():
        begun = time.monotonic()
        outcomes[name] = outcome = campaign(
            name, job, output / "jobs" / name, kills=config.kills, seed=config.seed
        )
        print(
            f"{name}: {outcome.kills} kills, {outcome.equal} equal, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        for note in outcome.notes:
            print(f"  {note}", flush=True)
        write_json(
            output / "report.json",
            {"jobs": {key: value.__dict__ for key, value in outcomes.items()}},
        )
    print(table(outcomes))
    return 0 if all(not outcome.notes for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    run_main(main)
