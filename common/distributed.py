"""What differs between machines and process counts: devices, kernels, batches, ZeRO, signals."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from vqrae.common.files import atomic_path

STALL_SECONDS = 600
"""No sample takes that long: a loader whose workers gave nothing for this time has lost them."""


def attention_implementation(
    choice: str = "auto", *, half: bool = True, device: str | torch.device | None = None
) -> str:
    """Resolve `auto`: on CUDA flash-attention 2 if installed, else `sdpa`; on CPU `eager`.

    On CPU `eager` trains a ViT of width 192 twice as fast as `sdpa`, and a Qwen3 1.4 times as fast.
    Flash-attention demands `half`, a model that computes in fp16 or bf16, and is else a ValueError.
    """
    if choice.startswith("flash_attention") and not half:
        raise ValueError(
            f"got {choice} in fp32, expected 16 bits: set bf16=true, or attention sdpa"
        )
    if choice != "auto":
        return choice
    on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if not on_cuda:
        return "eager"
    if not half:
        return "sdpa"
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return "sdpa"
    return "flash_attention_2"


def choose_device(name: str | torch.device | None = None) -> str:
    """The device of that name, ValueError if torch cannot use it; for None and `auto` the GPU if
    any.
    """
    if name is None or name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    # Not tried with a tensor, which would allocate a context on a GPU that belongs to another rank.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {name} cannot be used here: torch {torch.__version__} sees {count} GPUs"
        )
    return str(name)


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on the first process of the launch (also before the process group exists)."""
    return int(os.environ.get("RANK", "0")) == 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """`tensor` summed over all processes, in place; as it is where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, …) of every process one after the other (R, …), with their gradients.

    The gradient of a process's rows is the sum of what all processes send back.
    """
    return _GatherRows.apply(rows) if world_size() > 1 else rows


class _GatherRows(torch.autograd.Function):
    """`torch.distributed.nn` has this too, deprecated, and its successor has no stable name."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        torch.distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(world_size())[torch.distributed.get_rank()]


def end_process_group() -> None:
    """Leave the process group together: one that ends earlier would abort the others' threads."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def shared_path(path: Path) -> Iterator[Path]:
    """`atomic_path` for a folder that all processes write to; all enter and leave it together."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    with atomic_path(path) if is_main_process() else nullcontext() as temporary:
        names = [temporary]
        broadcast_object_list(names)
        yield Path(str(names[0]))
        PartialState().wait_for_everyone()  # all parts are written
    PartialState().wait_for_everyone()  # the folder has its name


def worker_options(num_workers: int) -> dict[str, Any]:
    """`DataLoader` arguments for this number of workers; one that dies silently is noticed."""
    return {"num_workers": num_workers, "timeout": STALL_SECONDS if num_workers else 0}


# ---- ZeRO


def prepare_cpu_deepspeed() -> None:
    """Spare DeepSpeed on CPU its 90 s build of a shared-memory collective; gloo takes its place."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # A private table, but the only switch; in a release without it, the build only takes its time.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


class FullPrecisionLinear(torch.nn.Linear):
    """A linear layer that computes outside of autocast.

    A class of its own: DeepSpeed sums gradients of exactly `nn.Linear` in autocast's precision.
    """


def require_same_partition(folder: Path, state: dict[str, Any], *, zero: int) -> None:
    """Refuse, with ValueError, a training state that is cut for another ZeRO stage or world size.

    `state` holds `zero` and `processes` of the launch that wrote it; missing ones are not compared.
    """
    found, processes = state.get("zero", zero), state.get("processes", world_size())
    if found != zero:
        raise ValueError(
            f"{folder} was written with zero={found}, got zero={zero}: set zero={found}"
        )
    if zero and processes != world_size():
        raise ValueError(
            f"{folder} holds optimizer states in {processes} parts, one per process, got "
            f"{world_size()} processes: launch {processes} (nproc=), or set another output_dir"
        )


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager:
    """A block in which `parameter` is whole and may be changed, also under ZeRO-3."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


# ---- batches


def fit_batch(global_batch_size: int, micro_batch_size: int, processes: int) -> tuple[int, int]:
    """Micro-batch size, and micro-batches per optimizer step, that keep the global batch size.

    A micro-batch that all processes together would fill beyond the batch is lowered. Raises
    ValueError when the batch does not divide, saying what would.
    """
    share, rest = divmod(global_batch_size, processes)
    if rest or not share:
        most = min(global_batch_size, 2 * processes)
        counts = [n for n in range(1, most + 1) if global_batch_size % n == 0]
        raise ValueError(
            f"global_batch_size {global_batch_size} cannot be shared evenly by {processes} "
            f"processes: launch {', '.join(map(str, counts))} processes (nproc=), or set "
            f"global_batch_size to a multiple of {processes}, such as {max(share, 1) * processes}"
        )
    micro_batch_size = min(micro_batch_size, share)
    if share % micro_batch_size:
        fits = max(size for size in range(1, micro_batch_size) if share % size == 0)
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
            f"{micro_batch_size} x {processes} processes = {micro_batch_size * processes}: "
            f"set micro_batch_size to {fits}, or to another divisor of {share}"
        )
    return micro_batch_size, share // micro_batch_size


# ---- signals


class StopRequest:
    """Ctrl-C or SIGTERM ends a training after its step, with a checkpoint; a second one at once.

    Processes get their signals at different steps, so they agree on one. The sum that is started
    after one step is read after the next: it is finished by then, and no step waits for it.
    `signal` is the number that reached this process or (once agreed) any; 0 for none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.signal = device, 0
        self._process = os.getpid()
        self._handlers: dict[int, Any] = {}
        self._answer: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __enter__(self) -> "StopRequest":
        # Only the main thread may handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        at_once = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, at_once)
        if os.getpid() != self._process:  # a worker of a loader; its training will end it
            return
        self.signal = number
        name = signal.Signals(number).name
        message = f"{name}: the training stops after this step and keeps a checkpoint"
        print(message, file=sys.stderr, flush=True)

    def agreed(self) -> bool:
        """Whether to stop here. All processes ask after each step and get the same answer."""
        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return self.signal != 0
        answer, self._answer = self._answer, self._ask()
        if answer is None:
            return False
        found, copied = answer
        if copied is not None:
            copied.synchronize()
        self.signal = self.signal or int(found)
        return int(found) != 0

    def end_process(self, step: int) -> NoReturn:
        """Report that the training ended at `step`, and exit with the code of the signal."""
        if is_main_process():
            print(f"stopped at step {step}: the same command continues", flush=True)
        end_process_group()
        raise SystemExit(128 + self.signal)

    def _ask(self) -> tuple[Tensor, torch.cuda.Event | None]:
        found = torch.full((), self.signal, device=self.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        if found.device.type != "cuda":
            return found, None
        host = torch.empty_like(found, device="cpu", pin_memory=True)
        copied = torch.cuda.Event()
        host.copy_(found, non_blocking=True)
        copied.record()
        return host, copied
