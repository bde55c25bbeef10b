"""The whole idea on one CPU: encoder, tokenizer, understanding, generation, scores, a report.

    bash scripts/quickstart.sh [--minutes M] [--system vqrae|unitok] [--output DIR]
                               [--sprites shapes|emoji]

Every step is an ordinary command with the configuration `tiny`; only the numbers of steps follow
the minutes. Understanding and generation need nothing of each other, so they run side by side, with
half of the cores each. A finished step is not repeated, an interrupted one resumes: after any
crash, run the same command again.
"""

import fcntl
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqrae.common.cli import parse
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, write_json
from vqrae.common.run import format_duration
from vqrae.quickstart.systems import SYSTEMS, System

REFERENCE_MINUTES = 12

# Optimizer steps at the reference minutes of what both systems train, which `System` adds to; they
# grow in proportion to the minutes …
TRAINING_STEPS = {
    "llm": 100,
    "understanding.pretrain": 30,
    "understanding.sft": 1100,
    "generation": 3000,
}
# … up to these factors, where more brings little (docs/quickstart.md). Generation takes the
# remaining time.
LARGEST_SCALE = {"llm": 1.0, "understanding.sft": 2.0, "generation": math.inf}
LARGEST_SCALE_OF_OTHERS = 3.0
GENERATION_BATCH = 32  # of the configuration `tiny`
GENERATION_EPOCHS = 2  # over the codes; each draws another of an image's captions
BYPASS_SHARE = 0.2  # of a stage with a continuous warm-up, which grows with it

_running: set[subprocess.Popen] = set()


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train and evaluate everything on the embedded scenes, and write DIR/report.html."""

    minutes: float = REFERENCE_MINUTES
    """Training time on two CPU cores."""
    system: Literal["vqrae", "unitok"] = "vqrae"
    """Which tokenizer; the report of each also shows the figures of the other, once it was run."""
    output: str | None = None
    """Folder of the run; the same command continues it. None: runs/quickstart, or
    runs/quickstart_unitok."""
    sprites: Literal["shapes", "emoji"] = "shapes"
    """What the scenes are made of."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes: got {self.minutes}, expected a positive number")

    @property
    def directory(self) -> Path:
        """`output`, or the default folder of the system."""
        return Path(self.output or SYSTEMS[self.system].directory)


@dataclass(frozen=True)
class Step:
    """One command of the pipeline."""

    name: str
    """Key of `seconds` in the report."""
    module: str
    """Run as `python -m vqrae.MODULE`."""
    arguments: list[str]
    """Its configuration and overrides."""
    seconds: float
    """Expected at the reference minutes on two cores without AMX, alongside the other branch."""
    training: str | None = None
    """Key of `training_steps` that the time grows with, if any."""


def training_steps(system: System) -> dict[str, int]:
    """Optimizer steps of every training at the reference minutes."""
    return TRAINING_STEPS | system.steps


def steps_within(minutes: float, system: System = SYSTEMS["vqrae"]) -> dict[str, int]:
    """Optimizer steps of every training for this many minutes on two cores."""
    scale = minutes / REFERENCE_MINUTES
    steps = {}
    for name, count in training_steps(system).items():
        largest = LARGEST_SCALE.get(name, LARGEST_SCALE_OF_OTHERS)
        steps[name] = max(4, round(count * min(scale, largest)))
    return steps


def save_every(count: int) -> str:
    """Checkpoints of a training of `count` steps: an interruption costs at most a fifth of it."""
    return f"save_steps={max(1, count // 5)}"


def pipeline(
    output: Path, steps: dict[str, int], sprites: str, system: System = SYSTEMS["vqrae"]
) -> list[list[list[Step]]]:
    """All commands: phases in order, each of parallel branches, each of steps in order."""
    source = "scenes" if sprites == "shapes" else f"scenes:{sprites}"
    scores = output / "evaluation"
    sft, generation = steps["understanding.sft"], steps["generation"]
    trunk = []
    tokenizer = [
        system.tokenizer,
        f"output_dir={output}/tokenizer",
        f"data.train={source}",
    ]
    if "encoder" in system.steps:
        encoder = [
            "tiny_encoder",
            f"output_dir={output}/encoder",
            f"sprites={sprites}",
            f"optimization.max_steps={steps['encoder']}",
            f"optimization.{save_every(steps['encoder'])}",
        ]
        trunk.append(Step("encoder", "quickstart.pretrain_encoder", encoder, 180, "encoder"))
        tokenizer.append(f"model.encoder={output}/encoder")
    stages = [name for name in system.steps if name.startswith("tokenizer.")]
    for name in stages:
        stage = name.removeprefix("tokenizer.")
        tokenizer.append(f"{stage}.max_steps={steps[name]}")
        if stage == system.bypass:
            tokenizer.append(f"{stage}.bypass_steps={round(BYPASS_SHARE * steps[name])}")
    longest = stages[-1]
    tokenizer.append(save_every(steps[longest]))
    reconstruction = [
        f"model={output}/tokenizer",
        f"data={source}",
        "num_images=1000",
        f"output={scores}/reconstruction.json",
    ]
    zero_shot = [
        f"model={output}/tokenizer",
        f"data={source}",
        "num_images=400",
        f"output={scores}/zeroshot.json",
    ]
    llm = ["tiny_llm", f"output_dir={output}/llm", f"optimization.max_steps={steps['llm']}"]
    understanding = [
        "tiny",
        f"output_dir={output}/understanding",
        f"tokenizer={output}/tokenizer",
        f"llm={output}/llm",
        f"data={source}",
        f"features={system.features}",
        f"pretrain.max_steps={steps['understanding.pretrain']}",
        f"sft.max_steps={sft}",
        f"sft.{save_every(sft)}",
    ]
    questions = [
        f"model={output}/understanding",
        f"sprites={sprites}",
        f"output={scores}/questions.json",
    ]
    codes = [
        "tiny",
        f"output_dir={output}/codes",
        f"tokenizer={output}/tokenizer",
        f"source={source}",
        f"size={generation * GENERATION_BATCH // GENERATION_EPOCHS}",
    ]
    generator = [
        "tiny",
        f"output_dir={output}/generation",
        f"tokenizer={output}/tokenizer",
        f"data={output}/codes",
        f"optimization.max_steps={generation}",
        f"optimization.{save_every(generation)}",
    ]
    geneval = [
        f"model={output}/generation",
        f"tokenizer={output}/tokenizer",
        f"sprites={sprites}",
        f"output={scores}/generation.json",
    ]
    trunk += [
        Step("tokenizer", "tokenizer.train", tokenizer, 330, longest),
        Step("eval_reconstruction", "eval.reconstruction.evaluate", reconstruction, 10),
        Step("eval_zeroshot", "eval.zeroshot.evaluate", zero_shot, 20),
    ]
    left = [
        Step("llm", "quickstart.train_llm", llm, 150, "llm"),
        Step("understanding", "understanding.train", understanding, 530, "understanding.sft"),
        Step("eval_understanding", "quickstart.scene_questions", questions, 30),
    ]
    right = [
        Step("codes", "generation.extract_codes", codes, 240, "generation"),
        Step("generation", "generation.train", generator, 1000, "generation"),
        Step("eval_generation", "eval.geneval.evaluate", geneval, 60),
    ]
    (other,) = [other for other in SYSTEMS.values() if other is not system]
    compared = [f"directory={output}", f"compare={other.directory}"]
    report = Step("report", "quickstart.report", compared, 10)
    unified = unified_model(output, steps, sprites) if system.unified else []
    return [[trunk], [left, right], [[*unified, report]]]


def unified_model(output: Path, steps: dict[str, int], sprites: str) -> list[Step]:
    """Training and scores of the unified model: it answers and generates as the two models do."""
    folder, scores = output / "mllm", output / "evaluation" / "mllm"
    source = "scenes" if sprites == "shapes" else f"scenes:{sprites}"
    training = ["tiny", f"output_dir={folder}"]
    training += [f"tokenizer={output}/tokenizer", f"llm={output}/llm"]
    training += [f"{task}.data={source}" for task in ("generation", "captioning", "instructions")]
    training.append(f"optimization.max_steps={steps['mllm']}")
    training.append(f"optimization.{save_every(steps['mllm'])}")
    scored = [f"model={folder}", f"sprites={sprites}"]
    questions = [*scored, f"output={scores}/questions.json"]
    geneval = [*scored, f"tokenizer={output}/tokenizer", f"output={scores}/generation.json"]
    return [
        Step("mllm", "mllm.train", training, 1000, "mllm"),
        Step("eval_mllm_questions", "quickstart.scene_questions", questions, 60),
        Step("eval_mllm_generation", "eval.geneval.evaluate", geneval, 120),
    ]


class Clock:
    """Seconds of every step in `steps/NAME.json`, written while it runs for interruptions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> dict:
        """Seconds of a step, and whether it is done."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() else {"seconds": 0.0, "done": False}

    def record(self, name: str, seconds: float, *, done: bool) -> None:
        """Write both."""
        write_json(self.folder / f"{name}.json", {"seconds": round(seconds, 1), "done": done})


@contextmanager
def exclusive_lock(output: Path) -> Iterator[None]:
    """Wait until no other process works in `output`.

    Steps inherit the lock: one that outlives a killed quickstart is waited for, not started again.
    """
    with open(output / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the processes of another run in {output}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        yield


def die_with_parent() -> list[str]:
    """Words before a command that end it when this process is killed; none outside of Linux."""
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def run(step: Step, clock: Clock, num_threads: int | None = None) -> None:
    """Run one command to its end.

    Args:
        num_threads: of its arithmetic; None leaves that to the environment.

    Raises:
        SystemExit: with its exit code, when it failed.
    """
    before, start = clock.read(step.name)["seconds"], time.time()
    command = [*die_with_parent(), sys.executable, "-m", f"vqrae.{step.module}", *step.arguments]
    environment = dict(os.environ)
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    process = subprocess.Popen(command, env=environment, close_fds=False)
    _running.add(process)
    code = None
    while code is None:
        try:
            code = process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            clock.record(step.name, before + time.time() - start, done=False)
    _running.remove(process)
    clock.record(step.name, before + time.time() - start, done=code == 0)
    if code:
        code = code if code > 0 else 128 - code  # as shells count signals
        print(f"\n{step.name} failed with exit code {code}: {' '.join(command)}")
        print("Run the same command again to continue.")
        raise SystemExit(code)


def run_phase(branches: Sequence[Sequence[Step]], clock: Clock) -> None:
    """Run the branches of a phase side by side, without the steps that are done.

    Raises:
        SystemExit: when a step failed, after the other branch has ended. Ctrl-C and SIGTERM end
            all.
    """
    stopped = threading.Event()
    num_threads = max(1, (os.cpu_count() or 1) // len(branches)) if len(branches) > 1 else None

    def run_branch(steps: Sequence[Step]) -> None:
        for step in steps:
            if stopped.is_set():
                return
            state = clock.read(step.name)
            if state["done"] and step.name != "report":
                print(f"{step.name}: done in {format_duration(state['seconds'])}", flush=True)
                continue
            print(f"{step.name}: begins", flush=True)
            run(step, clock, num_threads)
            seconds = clock.read(step.name)["seconds"]
            print(f"{step.name}: took {format_duration(seconds)}", flush=True)

    with ThreadPoolExecutor(len(branches)) as pool:
        started = [pool.submit(run_branch, steps) for steps in branches]
        try:
            wait(started)
        except BaseException:
            stopped.set()
            for process in set(_running):
                process.terminate()
            raise
    for branch in started:
        branch.result()


def expected_seconds(
    steps: Sequence[Step], planned: dict[str, int], clock: Clock, system: System
) -> float:
    """Time that the unfinished steps of a branch will take."""
    total = 0.0
    for step in steps:
        if not clock.read(step.name)["done"]:
            name = step.training
            total += step.seconds * (planned[name] / training_steps(system)[name] if name else 1)
    return total


def main(argv: list[str] | None = None) -> None:
    """Command line: --minutes, --system, --output, --sprites."""
    config = parse(QuickstartConfig, argv, program="bash scripts/quickstart.sh")
    output, system = config.directory, SYSTEMS[config.system]
    steps = steps_within(config.minutes, system)
    chosen = {
        "system": config.system,
        "minutes": config.minutes,
        "sprites": config.sprites,
        "steps": steps,
    }
    plan_file = output / "plan.json"
    # The plans of older runs do not name the system.
    if plan_file.exists() and {"system": "vqrae"} | read_json(plan_file) != chosen:
        raise ValueError(
            f"{output} was started with other options ({plan_file}): repeat them, or choose "
            "another --output"
        )
    write_json(plan_file, chosen)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    start = time.time()
    with exclusive_lock(output):
        clock = Clock(output / "steps")
        phases = pipeline(output, steps, config.sprites, system)
        for i, branches in enumerate(phases):
            left = 0.0
            for phase in phases[i:]:
                times = [expected_seconds(branch, steps, clock, system) for branch in phase]
                left += max(times)
            print(f"\nabout {format_duration(left)} left for the whole pipeline", flush=True)
            run_phase(branches, clock)
    print(f"\nfinished in {format_duration(time.time() - start)}; open {output / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
