"""The whole idea on one CPU: encoder, tokenizer, understanding, generation, all evaluations, one report.

    bash scripts/quickstart.sh [--minutes M] [--output DIR] [--sprites shapes|emoji]

Every step is the ordinary entry point with the configuration `tiny`; only the numbers of steps follow the minutes.
Understanding and generation need nothing of each other, so they run side by side, with half of the cores each.
A finished step is not repeated, an interrupted one continues: after any crash, run the same command again.
"""

import argparse
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

from vqrae.common.errors import run_main
from vqrae.common.files import read_json, write_json
from vqrae.common.run import format_duration

REFERENCE_MINUTES = 12

# Optimizer steps of every training step at the reference minutes; they grow in proportion with the time that one has …
TRAINING_STEPS = {
    "encoder": 500,
    "tokenizer.stage1": 50,
    "tokenizer.stage2": 700,
    "llm": 100,
    "understanding.pretrain": 30,
    "understanding.sft": 900,
    "generation": 2500,
}
# … up to so many times, where more brings little (docs/quickstart.md); generation takes what time is left.
LARGEST_SCALE = dict.fromkeys(TRAINING_STEPS, 3.0) | {
    "llm": 1.0,
    "understanding.sft": 2.0,
    "generation": math.inf,
}
GENERATION_BATCH = 32  # of the configuration `tiny`
GENERATION_EPOCHS = (
    2  # times that an image's codes are seen; another epoch draws another of its captions
)
BYPASS_SHARE = 0.2  # of stage 2: the continuous warm-up grows with the stage


_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Step:
    """One command of the pipeline.

    Attributes:
        name: key of `seconds` in the report.
        module: run as `python -m vqrae.MODULE`.
        arguments: its configuration and overrides.
        seconds: expected at the reference minutes on two cores without AMX, beside the other branch.
        training: key of `TRAINING_STEPS` that the time grows with, if any.
    """

    name: str
    module: str
    arguments: list[str]
    seconds: float
    training: str | None = None


def plan(minutes: float) -> dict[str, int]:
    """Optimizer steps of every training step for this many minutes of training on two cores."""
    scale = minutes / REFERENCE_MINUTES
    return {
        name: max(4, round(count * min(scale, LARGEST_SCALE[name])))
        for name, count in TRAINING_STEPS.items()
    }


def tokenizer_steps(output: Path, steps: dict[str, int], sprites: str, source: str) -> list[Step]:
    """Encoder, tokenizer, reconstruction."""
    return [
        Step(
            "encoder",
            "quickstart.pretrain_encoder",
            [
                "tiny_encoder",
                f"output_dir={output / 'encoder'}",
                f"sprites={sprites}",
                f"optimization.max_steps={steps['encoder']}",
                f"optimization.{save_every(steps['encoder'])}",
            ],
            180,
            "encoder",
        ),
        Step(
            "tokenizer",
            "tokenizer.train",
            [
                "tiny",
                f"output_dir={output / 'tokenizer'}",
                f"model.encoder={output / 'encoder'}",
                f"data.train={source}",
                f"stage1.max_steps={steps['tokenizer.stage1']}",
                f"stage2.max_steps={steps['tokenizer.stage2']}",
                f"stage2.bypass_steps={round(BYPASS_SHARE * steps['tokenizer.stage2'])}",
                save_every(steps["tokenizer.stage2"]),
            ],
            330,
            "tokenizer.stage2",
        ),
        Step(
            "eval_reconstruction",
            "eval.reconstruction.evaluate",
            [
                f"model={output / 'tokenizer'}",
                f"data={source}",
                "num_images=1000",
                f"output={output / 'evaluation' / 'reconstruction.json'}",
            ],
            10,
        ),
    ]


def understanding_steps(
    output: Path, steps: dict[str, int], sprites: str, source: str
) -> list[Step]:
    """Language model, LLaVA, questions."""
    return [
        Step(
            "llm",
            "quickstart.train_llm",
            ["tiny_llm", f"output_dir={output / 'llm'}", f"optimization.max_steps={steps['llm']}"],
            150,
            "llm",
        ),
        Step(
            "understanding",
            "understanding.train",
            [
                "tiny",
                f"output_dir={output / 'understanding'}",
                f"tokenizer={output / 'tokenizer'}",
                f"llm={output / 'llm'}",
                f"data={source}",
                f"pretrain.max_steps={steps['understanding.pretrain']}",
                f"sft.max_steps={steps['understanding.sft']}",
                f"sft.{save_every(steps['understanding.sft'])}",
            ],
            1100,
            "understanding.sft",
        ),
        Step(
            "eval_understanding",
            "quickstart.scene_questions",
            [
                f"model={output / 'understanding'}",
                f"sprites={sprites}",
                f"output={output / 'evaluation' / 'questions.json'}",
            ],
            30,
        ),
    ]


def generation_steps(output: Path, steps: dict[str, int], sprites: str, source: str) -> list[Step]:
    """Codes, generator, GenEval."""
    return [
        Step(
            "codes",
            "generation.extract_codes",
            [
                "tiny",
                f"output_dir={output / 'codes'}",
                f"tokenizer={output / 'tokenizer'}",
                f"source={source}",
                f"size={steps['generation'] * GENERATION_BATCH // GENERATION_EPOCHS}",
            ],
            240,
            "generation",
        ),
        Step(
            "generation",
            "generation.train",
            [
                "tiny",
                f"output_dir={output / 'generation'}",
                f"tokenizer={output / 'tokenizer'}",
                f"data={output / 'codes'}",
                f"optimization.max_steps={steps['generation']}",
                f"optimization.{save_every(steps['generation'])}",
            ],
            1000,
            "generation",
        ),
        Step(
            "eval_generation",
            "eval.geneval.evaluate",
            [
                f"model={output / 'generation'}",
                f"tokenizer={output / 'tokenizer'}",
                f"sprites={sprites}",
                f"output={output / 'evaluation' / 'generation.json'}",
            ],
            60,
        ),
    ]


def save_every(count: int) -> str:
    """Checkpoints of a training of `count` steps: an interruption costs at most a fifth of it."""
    return f"save_steps={max(1, count // 5)}"


def pipeline(output: Path, steps: dict[str, int], sprites: str) -> list[list[list[Step]]]:
    """All commands: phases that follow each other, each of branches that run side by side, each of steps in order."""
    source = "scenes" if sprites == "shapes" else f"scenes:{sprites}"
    trunk, *branches = (
        part(output, steps, sprites, source)
        for part in (tokenizer_steps, understanding_steps, generation_steps)
    )
    report = Step("report", "quickstart.report", [f"directory={output}"], 10)
    return [[trunk], branches, [[report]]]


class Clock:
    """Seconds of every step in `steps/NAME.json`, kept while it runs: an interrupted step's time is not lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def spent(self, name: str) -> float:
        return read_json(self.path(name))["seconds"] if self.path(name).exists() else 0.0

    def is_done(self, name: str) -> bool:
        return self.path(name).exists() and read_json(self.path(name))["done"]

    def record(self, name: str, seconds: float, *, done: bool) -> None:
        write_json(self.path(name), {"seconds": round(seconds, 1), "done": done})


@contextmanager
def sole_user(output: Path) -> Iterator[None]:
    """Wait until nobody else works in `output`.

    Steps inherit the lock: where one outlives a killed quickstart, it is waited for and not started again beside itself.
    """
    with open(output / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the processes of another run in {output}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        yield


def ends_with_us() -> list[str]:
    """Words in front of a command that end it when this process is killed, where the system has them (Linux)."""
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def run(step: Step, clock: Clock, num_threads: int | None = None) -> None:
    """Run one command to its end.

    Args:
        num_threads: of its arithmetic; None leaves that to the environment.

    Raises:
        SystemExit: with its exit code, when it failed.
    """
    before, start = clock.spent(step.name), time.time()
    command = [*ends_with_us(), sys.executable, "-m", f"vqrae.{step.module}", *step.arguments]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(num_threads)} if num_threads else {})}
    process = subprocess.Popen(command, env=environment, close_fds=False)
    _running.add(process)
    while True:
        try:
            code = process.wait(timeout=2)
            break
        except subprocess.TimeoutExpired:
            clock.record(step.name, before + time.time() - start, done=False)
    _running.remove(process)
    clock.record(step.name, before + time.time() - start, done=code == 0)
    if code:
        code = code if code > 0 else 128 - code  # as shells count signals
        print(
            f"\n{step.name} failed with exit code {code}: {' '.join(command)}\nRun the same command again to continue."
        )
        raise SystemExit(code)


def run_phase(branches: Sequence[Sequence[Step]], clock: Clock) -> None:
    """Run the branches of a phase side by side, what is done in them left out.

    Raises:
        SystemExit: when a step failed; the other branch first comes to its end. Ctrl-C and SIGTERM end all of them.
    """
    stopped = threading.Event()
    num_threads = max(1, (os.cpu_count() or 1) // len(branches)) if len(branches) > 1 else None

    def run_branch(steps: Sequence[Step]) -> None:
        for step in steps:
            if stopped.is_set():
                return
            if clock.is_done(step.name) and step.name != "report":
                print(f"{step.name}: done in {format_duration(clock.spent(step.name))}", flush=True)
                continue
            print(f"{step.name}: begins", flush=True)
            run(step, clock, num_threads)
            print(f"{step.name}: took {format_duration(clock.spent(step.name))}", flush=True)

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="quickstart.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=REFERENCE_MINUTES,
        help="training time on two cores (default: 12)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart"
    )
    parser.add_argument(
        "--sprites",
        choices=("shapes", "emoji"),
        default="shapes",
        help="what the scenes are made of",
    )
    options = parser.parse_args(argv)
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes: got {options.minutes}, expected a positive number")

    output: Path = options.output
    chosen = {
        "minutes": options.minutes,
        "sprites": options.sprites,
        "steps": plan(options.minutes),
    }
    plan_file = output / "plan.json"
    if plan_file.exists() and read_json(plan_file) != chosen:
        parser.error(
            f"{output} was begun with other options ({plan_file}): repeat them, or choose another --output"
        )
    write_json(plan_file, chosen)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    begun = time.time()
    with sole_user(output):
        clock, phases = Clock(output / "steps"), pipeline(output, chosen["steps"], options.sprites)

        def expected(steps: Sequence[Step]) -> float:
            return sum(
                step.seconds * growth(step) for step in steps if not clock.is_done(step.name)
            )

        def growth(step: Step) -> float:
            return (
                chosen["steps"][step.training] / TRAINING_STEPS[step.training]
                if step.training
                else 1
            )

        for i, branches in enumerate(phases):
            left = sum(max(map(expected, phase)) for phase in phases[i:])
            print(f"\nabout {format_duration(left)} left for the whole pipeline", flush=True)
            run_phase(branches, clock)
    print(f"\nfinished in {format_duration(time.time() - begun)}; open {output / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
