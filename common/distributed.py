"""What differs between machines: attention kernels, threads, CPU process groups, DeepSpeed without a GPU."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch


def attention_implementation(
    choice: str = "auto", *, half: bool = True, device: str | torch.device | None = None
) -> str:
    """Resolve `auto`: flash-attention 2 when installed on CUDA, `sdpa` on CUDA, plain matmul-softmax on CPU.

    On CPU `eager` trains small models faster: a ViT of width 192 twice, a Qwen3 of width 192 1.4 times as fast as `sdpa`.

    Args:
        half: whether the model computes in fp16 or bf16 (autocast counts), which is all that flash-attention accepts.
        device: that the model is for; None means CUDA when there is one.

    Raises:
        ValueError: when flash-attention is chosen for a model that computes in fp32.
    """
    if choice.startswith("flash_attention") and not half:
        raise ValueError(
            f"got attention {choice} in fp32, expected fp16 or bf16: set bf16=true, or attention sdpa"
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
    """The device of that name; for None and `auto` CUDA when there is one, else the CPU.

    Raises:
        ValueError: when torch cannot use it here.
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
    # Counted and not tried, for a tensor would open this process's share of a GPU that another rank works on.
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


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all processes, in place; as it is where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def end_process_group() -> None:
    """Leave the process group together, before the interpreter ends: a thread of it that is still at work then aborts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def prepare_cpu_deepspeed() -> None:
    """Let DeepSpeed start on CPU without its 90 s build of the shared-memory collective; gloo takes its place."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # A private table, and the only switch there is: absent in some release, the build merely takes its time again.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


class FullPrecisionLinear(torch.nn.Linear):
    """A linear layer that computes outside of autocast.

    A class of its own, for DeepSpeed adds up the gradients of exactly `nn.Linear` in the lower precision of autocast.
    """


def require_same_partition(folder: Path, state: dict[str, Any], *, zero: int) -> None:
    """Refuse a training state that ZeRO cannot read: its parts belong to one stage and one number of processes.

    Args:
        folder: of the checkpoint, for the message.
        state: `zero` and `processes` of the launch that wrote it; a state that does not say is let through.

    Raises:
        ValueError: naming what to set.
    """
    found, processes = state.get("zero", zero), state.get("processes", world_size())
    if found != zero:
        raise ValueError(
            f"{folder} was written with zero={found}, got zero={zero}: set zero={found} to continue"
        )
    if zero and processes != world_size():
        raise ValueError(
            f"{folder} holds optimizer states in {processes} parts, one for each process of DeepSpeed, "
            f"got {world_size()} processes: launch {processes} (nproc=), or set another output_dir"
        )


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager:
    """A block in which `parameter` is whole and may be changed, also where ZeRO-3 has partitioned it."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def fit_batch(global_batch_size: int, micro_batch_size: int, processes: int) -> tuple[int, int]:
    """Micro-batch size and micro-batches per optimizer step that keep the global batch size on this many processes.

    Args:
        micro_batch_size: what fits one process; less is taken where the processes together would exceed the global batch.

    Raises:
        ValueError: when it does not divide.
    """
    share, rest = divmod(global_batch_size, processes)
    if rest or not share:
        counts = [
            count
            for count in range(1, min(global_batch_size, 2 * processes) + 1)
            if global_batch_size % count == 0
        ]
        raise ValueError(
            f"global_batch_size {global_batch_size} cannot be shared evenly by {processes} processes: launch "
            f"{', '.join(map(str, counts))} processes (nproc=), or set global_batch_size to a multiple of {processes}, "
            f"such as {max(share, 1) * processes}"
        )
    micro_batch_size = min(micro_batch_size, share)
    if share % micro_batch_size:
        fits = max(size for size in range(1, micro_batch_size) if share % size == 0)
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"{processes} processes = {micro_batch_size * processes}: set micro_batch_size to {fits}, or to another divisor "
            f"of {share}"
        )
    return micro_batch_size, share // micro_batch_size
