"""The training engines of the tokenizer: one `Accelerator` for the tokenizer, one for the discriminator.

Each holds one model and one optimizer, so the same loop runs in one process, under DDP and under DeepSpeed ZeRO-1/2
(where every trained model needs an engine of its own).
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
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vqrae.common.distributed import prepare_cpu_deepspeed
from vqrae.common.optim import Muon
from vqrae.tokenizer.config import StageConfig
from vqrae.tokenizer.encoders import final_norm
from vqrae.tokenizer.modeling import VQRAEModel

BUCKET = 100_000_000  # values that ZeRO sends at once: buffers of 0.4 GB each instead of the default's 2 GB


def allow_tf32(allowed: bool) -> None:
    """Let fp32 products and convolutions of this process use TF32 on CUDA, or not.

    By the older of PyTorch's switches, for `torch.compile` asks that one and fails after the newer.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def build_accelerators(
    stage: StageConfig, *, zero: int, accumulation: int, bf16: bool
) -> tuple[Accelerator, Accelerator]:
    """Accelerators for tokenizer and discriminator.

    Precision is the loop's matter (parameters stay fp32, forward passes run under autocast), so none is set here.
    """
    on_cpu = not torch.cuda.is_available()
    if not zero:
        # Else DDP holds all gradients twice, and sends the codebook, which is equal everywhere, in every forward pass.
        lean = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        options: dict[str, Any] = {
            "gradient_accumulation_steps": accumulation,
            "kwargs_handlers": [lean],
        }
        return Accelerator(cpu=on_cpu, **options), Accelerator(cpu=on_cpu, **options)
    prepare_cpu_deepspeed()
    AcceleratorState._reset_state()  # plugins are read once per process; the second stage brings its own
    if on_cpu:
        PartialState(cpu=True)  # `Accelerator(cpu=True)` would drop DeepSpeed without a word
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
    # The discriminator judges in fp32, so its gradients are added up in fp32 as well.
    judging = settings | {"torch_autocast": {"enabled": False}}
    plugins = {
        name: DeepSpeedPlugin(hf_ds_config=dict(chosen))
        for name, chosen in (("tokenizer", settings), ("discriminator", judging))
    }
    first = Accelerator(deepspeed_plugins=plugins)
    if first.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"zero={zero} was asked for, but accelerate chose {first.distributed_type}"
        )
    return first, Accelerator()


def prepare(
    accelerator: Accelerator, name: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """Wrap a model and its optimizer for the engine `name`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.select_deepspeed_plugin(name)
    return accelerator.prepare(model, optimizer)


@torch.no_grad()
def share_from_main(module: nn.Module) -> None:
    """Every process takes over the main one's weights and buffers, after work whose rounding may differ among them."""
    for tensor in (*module.parameters(), *module.buffers()):
        broadcast(tensor.data)


def refresh_master_weights(optimizer: Any) -> None:
    """Let ZeRO know of weights that were changed by hand: it trains copies of its own, which the next step would bring back."""
    zero = getattr(optimizer, "optimizer", optimizer)
    if hasattr(zero, "refresh_fp32_params"):
        zero.refresh_fp32_params()


def set_trainable(model: VQRAEModel, stage: StageConfig) -> None:
    """Stage 1 freezes the encoder; what lies behind the feature tap never gets a gradient and is frozen too."""
    model.encoder.requires_grad_(not stage.freeze_encoder)
    if model.config.feature_tap == "hidden_states[-1]":
        final_norm(model.encoder).requires_grad_(False)


def build_optimizer(
    modules: dict[str, tuple[nn.Module, float]],
    stage: StageConfig,
    name: Literal["adamw", "muon"] = "adamw",
) -> torch.optim.Optimizer:
    """The optimizer of modules with their learning rates. Under Muon, vectors and the quantizer stay with AdamW."""
    groups = parameter_groups(modules, stage.weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=stage.adam_betas, fused=True)
    for group in groups:
        group["use_fallback"] = group["name"] == "quantizer" or group["plain"]
    return Muon(groups, nesterov=True, betas=stage.adam_betas)


def parameter_groups(
    modules: dict[str, tuple[nn.Module, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of modules with their learning rates.

    Vectors (biases, norms, positions, scales) are `plain`: not decayed. Groups without parameters are left out.
    """
    groups = []
    for name, (module, learning_rate) in modules.items():
        trainable = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
        plain = {key for key, p in trainable if p.ndim < 2 or "position" in key}
        for is_plain, keys in ((True, plain), (False, {key for key, _ in trainable} - plain)):
            group = {
                "lr": learning_rate,
                "weight_decay": 0.0 if is_plain else weight_decay,
                "name": name,
                "plain": is_plain,
            }
            parameters = [p for key, p in trainable if key in keys]
            if parameters:
                groups.append({"params": parameters, **group})
    return groups


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """`torch.compile` every transformer block of a model, in place; equal blocks share one compilation.

    Args:
        options: of `torch.compile`.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(**options)
