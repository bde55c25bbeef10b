"""Start a job: make what it needs first, choose the processes, hand over to python or torchrun.

    python -m vqrae.scripts.launch MODULE [config=NAME] [nproc=N] [zero=0-3] [key=value ...]

Nothing is installed here. Where a job starts from the result of another, its configuration names
it, by the key that holds the path:

    prepare:
      llm: quickstart.train_llm config=tiny_llm

The launcher runs that job first if the path does not exist and the key was not given; `{key}` in it
is the value of another key. The section is the launcher's alone, jobs do not see it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vqrae.common.config import (
    ConfigError,
    build_config,
    check_range,
    did_you_mean,
    parse_yaml,
    read_yaml,
    set_value,
    shipped_config,
)
from vqrae.common.errors import run_main


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `jobs.yaml` says of a module."""

    config: str | None = None
    """Its default configuration; None: it takes keys alone."""
    section: str = ""
    """The part of the configuration that it reads."""
    short: dict[str, str] = field(default_factory=dict)
    """Short keys, and those of the configuration that they mean."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Arguments unless given."""
    zero: tuple[str, ...] = ()
    """Keys that hold a stage of DeepSpeed ZeRO."""
    prepare: dict[str, str] = field(default_factory=dict)
    """As in a configuration, for a module that has none."""
    unless: tuple[str, ...] = ()
    """Arguments that make `prepare` unnecessary."""
    extras: tuple[str, ...] = ()
    """Optional dependencies, by their names in setup.py."""
    extras_where: dict[str, str] = field(default_factory=dict)
    """Further ones, by the `key` that must be set or the `key=value` that must hold."""
    processes: int | None = None
    """Default of nproc; None: the GPUs."""
    launches: bool = False
    """It starts processes itself, and takes nproc as a key."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The launcher's own arguments; all others go to the job."""

    config: str | None = None
    nproc: int | None = None
    nnodes: int = 1
    node_rank: int | None = None
    zero: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "nproc", "nnodes", low=1)
        check_range(self, "zero", low=0, high=3)


@dataclass(frozen=True)
class Command:
    """A job, its arguments, and what was decided about its launch."""

    module: str
    arguments: list[str]
    launch: Launch
    processes: int | None
    """On this node; None: the GPUs."""
    zero: int
    extras: set[str]
    output: str


# One of these is in the folder of a finished job: of a model, of codes, of photographs.
FINISHED = ("model/config.json", "shard-00000.npy", "SOURCES.md")
JOBS = {
    name: build_config(Job, values, source=name)
    for name, values in parse_yaml(Path(__file__).with_name("jobs.yaml").read_text()).items()
}


# ---- what to run


def plan_commands(module: str, arguments: Sequence[str]) -> list[Command]:
    """The commands to run in order: those that make what is missing, then the job itself."""
    if module not in JOBS:
        raise ConfigError(f"unknown module {module!r}. {did_you_mean(module, JOBS)}")
    job = JOBS[module]
    launch, keys = split_arguments(job, arguments)
    settings, prepare = read_settings(module, launch.config, keys)
    before: list[Command] = []
    if not keys.keys() & set(job.unless):
        for key, maker in prepare.items():
            if key not in keys:
                before += prepare_key(key, maker, keys, settings, launch)

    zero = max((int(value_of(settings, key) or 0) for key in job.zero), default=0)
    extras = required_extras(job, settings) | ({"deepspeed"} if zero else set())
    processes = launch.nproc or job.processes
    if job.launches:
        keys["nproc"] = str(processes or count_gpus())
        processes = 1
    words = [launch.config] if launch.config else []
    words += [f"{key}={value}" for key, value in keys.items()]
    output = str(settings.get("output_dir") or settings.get("output"))
    return [*before, Command(module, words, launch, processes, zero, extras, output)]


def split_arguments(job: Job, arguments: Sequence[str]) -> tuple[Launch, dict[str, str]]:
    """The launcher's arguments, and those of the job under their full keys."""
    names = {option.name for option in fields(Launch)}
    own: dict[str, Any] = {"config": job.config}
    keys = dict(job.defaults)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not (key and equals):
            raise ConfigError(f"got {argument!r}, expected key=value; see --help")
        if key in names:
            own[key] = value if key == "config" else parse_yaml(value, source=argument)
        else:
            keys[job.short.get(key, key)] = value
    launch = build_config(Launch, own, source="command line")
    if launch.zero is not None:
        keys |= dict.fromkeys(job.zero, str(launch.zero))
    return launch, keys


def read_settings(
    module: str, config: str | None, keys: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What YAML and arguments say, without defaults of code, and what must be made before."""
    job = JOBS[module]
    settings: dict[str, Any] = {}
    prepare = dict(job.prepare)
    if config:
        file = shipped_config(f"vqrae.{module.partition('.')[0]}", config)
        settings = read_yaml(file)
        settings = settings[job.section] if job.section else settings
        prefix = f"{job.section}." if job.section else ""
        # `read_yaml` hides this section, which is the launcher's alone.
        for key, maker in (parse_yaml(file.read_text("utf-8-sig")).get("prepare") or {}).items():
            if key.startswith(prefix):
                prepare[key.removeprefix(prefix)] = maker
    for key, value in keys.items():
        set_value(settings, key, None if value in ("", "null") else value)
    return settings, prepare


def prepare_key(
    key: str, maker: str, keys: dict[str, str], settings: dict[str, Any], launch: Launch
) -> list[Command]:
    """Let `key` name the folder that `maker` makes; returns the commands for it, if any.

    Raises ConfigError on several nodes, which would all make it.
    """
    module, *arguments = [word.format_map(settings) for word in maker.split()]
    configured = value_of(settings, key)
    if configured:
        arguments.append(f"output={configured}")
    commands = plan_commands(module, arguments)
    folder = Path(commands[-1].output)
    # The quickstart makes the same models, in a folder of its own.
    for place in (folder, folder.parent / "quickstart" / folder.name):
        if any((place / name).is_file() for name in FINISHED):
            folder, commands = place, []
            break
    if commands and launch.nnodes > 1:
        first = f"python -m vqrae.scripts.launch {module} {' '.join(arguments)}"
        raise ConfigError(f"{folder} does not exist: first, on one node, run {first}")
    if str(folder) != configured:
        keys[key] = str(folder)
    set_value(settings, key, str(folder))
    return commands


def required_extras(job: Job, settings: dict[str, Any]) -> set[str]:
    """The optional dependencies of a job with these settings."""
    extras = set(job.extras)
    for condition, extra in job.extras_where.items():
        key, _, wanted = condition.partition("=")
        value = value_of(settings, key)
        if value == wanted if wanted else value is not None:
            extras.add(extra)
    return extras


def value_of(settings: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


# ---- how to run it


def command_line(command: Command) -> list[str]:
    """One plain process, or torchrun for more and for DeepSpeed, which reads its variables."""
    launch = command.launch
    processes = command.processes or count_gpus()
    job = ["-m", f"vqrae.{command.module}", *command.arguments]
    if processes == 1 and launch.nnodes == 1 and not command.zero:
        return [sys.executable, *job]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous(launch)]
    return [*torchrun, "--nproc_per_node", str(processes), *job]


def rendezvous(launch: Launch) -> list[str]:
    """How torchrun's nodes find each other."""
    if launch.nnodes == 1:
        return ["--standalone"]
    first, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "29500")
    if not first:
        name = "MASTER_ADDR, the name of the first node"
        raise ConfigError(f"nnodes={launch.nnodes} needs {name}, on every node")
    nodes = ["--nnodes", str(launch.nnodes)]
    rank = os.environ.get("SLURM_NODEID") if launch.node_rank is None else str(launch.node_rank)
    if rank is None:
        return [*nodes, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first}:{port}"]
    return [*nodes, "--node_rank", rank, "--master_addr", first, "--master_port", port]


def count_gpus() -> int:
    """The GPUs that torch sees; 1 where there are none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and "CUDA_VISIBLE_DEVICES" not in os.environ and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        if listed.startswith("GPU "):
            why = "an old driver, or a build for CPU"
            note = f"note: torch in {sys.executable} can use none of the GPUs here ({why})"
            print(f"{note}: this runs on CPU", file=sys.stderr)
    return max(count, 1)


def run(line: list[str]) -> None:
    """Run a command to its end. Raises SystemExit with its exit code, when it failed."""
    print("+", *line, flush=True)
    with subprocess.Popen(line) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it keeps a checkpoint; the with statement waits for that
            raise
    if code:
        raise SystemExit(code if code > 0 else 128 - code)  # below 0: ended by a signal


def main(argv: list[str] | None = None) -> None:
    """Command line: [--extras] MODULE [key=value ...]; --extras only says what to install."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    only_extras = arguments[:1] == ["--extras"]
    module, *keys = arguments[only_extras:]
    if "--help" in keys or "-h" in keys:
        show_help(module)
    *before, job = plan_commands(module, keys)
    if only_extras:
        print(*sorted(job.extras.union(*(command.extras for command in before))))
        return
    os.environ.update(TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # the checkpoint after SIGTERM
    for command in before:
        print(f"{command.output} does not exist: it is made first", flush=True)
        run(command_line(command))
    line = command_line(job)
    print("+", *line, flush=True)
    os.execv(line[0], line)  # so that signals reach the job itself


def show_help(module: str) -> None:
    """The keys of the launcher, then those of the job."""
    job = JOBS[module]
    print("config=NAME nproc=N nnodes=M node_rank=R zero=0-3 choose the launch: docs/cluster.md")
    for name, meaning in (job.short | job.defaults).items():
        print(f"{name}= is {meaning if name in job.short else f'by default {meaning}'}")
    print(flush=True)
    os.execv(sys.executable, [sys.executable, "-m", f"vqrae.{module}", "--help"])


if __name__ == "__main__":
    run_main(main)
