"""Training engines: one `Accelerator` for the tokenizer, one for the discriminator.

Each holds one network and one optimizer, so the same loop runs in one process, under DDP, and under
DeepSpeed ZeRO-1/2, which needs an engine for every trained network.
"""

from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast,
)
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vqrae.common.distributed import prepare_cpu_deepspeed
from vqrae.common.lean import make_lean
from vqrae.common.optim import Muon
from vqrae.tokenizer.config import StageConfig

BUCKET = (
    100_000_000  # values in one ZeRO message: buffers of 0.4 GB each, where the default has 2 GB
)


def allow_tf32(allowed: bool) -> None:
    """Let fp32 products and convolutions of this process use TF32 on CUDA, or not."""
    # The older of PyTorch's two switches: torch.compile reads it, and fails after the newer one.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def build_accelerators(
    stage: StageConfig, *, zero: int, accumulation: int, bf16: bool
) -> tuple[Accelerator, Accelerator]:
    """Accelerators of the tokenizer and of the discriminator.

    They set no precision: parameters stay fp32, and the loop runs forward passes under autocast.
    """
    on_cpu = not torch.cuda.is_available()
    if not zero:
        # By default DDP holds all gradients twice, and sends all buffers (the codebook, which is
        # equal everywhere) in every forward pass.
        lean = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        options: dict[str, Any] = {
            "gradient_accumulation_steps": accumulation,
            "kwargs_handlers": [lean],
        }
        return Accelerator(cpu=on_cpu, **options), Accelerator(cpu=on_cpu, **options)
    prepare_cpu_deepspeed()
    AcceleratorState._reset_state()  # plugins are read once per process; stage 2 brings its own
    if on_cpu:
        PartialState(cpu=True)  # `Accelerator(cpu=True)` would silently drop DeepSpeed
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.max_grad_norm,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    # The discriminator computes in fp32, so its gradients are summed in fp32 as well.
    in_fp32 = settings | {"torch_autocast": {"enabled": False}}
    plugins = {
        "tokenizer": DeepSpeedPlugin(hf_ds_config=settings),
        "discriminator": DeepSpeedPlugin(hf_ds_config=in_fp32),
    }
    first = Accelerator(deepspeed_plugins=plugins)
    if first.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(f"got zero={zero}, but accelerate chose {first.distributed_type}")
    return first, Accelerator()


class WithHeads(nn.Module):
    """A network with heads that its engine also trains, saves and shares; called like it."""

    def __init__(self, network: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.network, self.heads = network, heads

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.network(*arguments, **options)


def prepare(
    accelerator: Accelerator,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    heads: nn.Module | None = None,
) -> tuple[Any, Any]:
    """Wrap a network, heads that have parameters, and their optimizer for the engine `name`."""
    if accelerator.device.type == "cpu":
        make_lean(model)
    if heads is not None and list(heads.parameters()):
        model = WithHeads(model, heads)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.select_deepspeed_plugin(name)
    return accelerator.prepare(model, optimizer)


@torch.no_grad()
def share_from_main(module: nn.Module) -> None:
    """Give every process the main one's weights and buffers, after work that may round."""
    for tensor in (*module.parameters(), *module.buffers()):
        broadcast(tensor.data)


def refresh_master_weights(optimizer: Any) -> None:
    """Push edited weights into ZeRO's fp32 masters, or the next step overwrites them."""
    zero = getattr(optimizer, "optimizer", optimizer)
    if hasattr(zero, "refresh_fp32_params"):
        zero.refresh_fp32_params()


def clip_gradients(
    engine: Accelerator, optimizer: Any, module: nn.Module, max_norm: float
) -> Tensor:
    """Clip gradients, and make the next `optimizer.step()` a no-op where their norm is not finite.

    Fused AdamW reads `found_inf`, a gradient scaler's, on the device: weights, moments and step
    count then stay. DeepSpeed clips, checks and skips by itself, with a host sync of its own.

    Returns:
        The norm before clipping over all processes, a scalar tensor; NaN where it is not finite.
    """
    norm = engine.clip_grad_norm_(module.parameters(), max_norm)
    norm = torch.as_tensor(norm, device=engine.device)
    finite = norm.isfinite()
    optimizer.optimizer.found_inf = (~finite).float()
    return torch.where(finite, norm, torch.nan)


# --------------------------------------------------------------------------------------- optimizers


def build_optimizer(
    modules: dict[str, tuple[nn.Module, float]],
    stage: StageConfig,
    name: Literal["adamw", "muon"] = "adamw",
) -> torch.optim.Optimizer:
    """The optimizer of modules with their rates; Muon leaves vectors, quantizer, text to AdamW."""
    groups = parameter_groups(modules, stage.weight_decay)
    if name == "adamw":
        betas, eps = stage.adam_betas, stage.adam_eps
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    for group in groups:
        group["use_fallback"] = group["name"] in ("quantizer", "text") or group["plain"]
    return Muon(groups, nesterov=True, betas=stage.adam_betas)


def parameter_groups(
    modules: dict[str, tuple[nn.Module, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters of each module in two groups, if not empty: `plain` ones, then matrices.

    Plain are biases, norms, scales and positions, which do not decay.
    """
    groups: list[dict[str, Any]] = []
    for name, (module, learning_rate) in modules.items():
        plain: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_plain = parameter.ndim < 2 or "position" in key
                (plain if is_plain else matrices).append(parameter)
        group = {"lr": learning_rate, "name": name}
        if plain:
            groups.append({"params": plain, "weight_decay": 0.0, "plain": True, **group})
        if matrices:
            groups.append(
                {"params": matrices, "weight_decay": weight_decay, "plain": False, **group}
            )
    return groups


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """`torch.compile` every transformer block in place; equal blocks share one compilation."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(**options)
