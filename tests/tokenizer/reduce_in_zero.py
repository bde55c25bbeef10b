"""Gradients that ZeRO sums over two processes under bf16, next to their fp32 mean.

Run by test_train.py.
"""

import json
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import is_main_process, sum_over_processes, world_size
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.discriminator import PatchDiscriminator
from vqrae.tokenizer.engine import build_accelerators, build_optimizer, prepare
from vqrae.tokenizer.modeling import VQRAEModel

YAML = shipped_config("vqrae.tokenizer", "tiny")
stage = load_config(TokenizerTrainConfig, YAML, ["stage2.max_grad_norm=0"]).stage2
engine, d_engine = build_accelerators(stage, zero=2, accumulation=1, bf16=True)
torch.manual_seed(0)
encoder = {"model_type": "siglip_vision_model", "patch_size": 8, "vision_use_head": False}
encoder |= {"hidden_size": 32, "intermediate_size": 64, "image_size": 32}
encoder |= {"num_hidden_layers": 1, "num_attention_heads": 2}
model = VQRAEModel(VQRAEConfig(encoder_config=encoder, codebook_size=64, codebook_dim=32))
discriminator = PatchDiscriminator((8, 16))
images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(engine.process_index))
distances: dict[str, float] = {}


def compare(name: str, module: nn.Module, accelerator, loss) -> None:
    """Relative distance of each gradient under ZeRO from the mean of autograd's over processes."""
    loss(module).backward()
    parameters = dict(module.named_parameters())
    trained = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
    module.zero_grad()
    optimizer = build_optimizer({name: (module, 1e-3)}, stage)
    wrapped, optimizer = prepare(accelerator, name, module, optimizer)
    accelerator.deepspeed_engine_wrapped.engine.backward(loss(wrapped))
    for key, gradient in trained.items():
        expected = sum_over_processes(gradient) / world_size()
        error = (safe_get_full_grad(parameters[key]) - expected).norm()
        distances[f"{name}.{key}"] = float(error / expected.norm().clamp(min=1e-12))


def tokenizer_loss(module: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        output = module(images)
    return (output.reconstruction - images).square().mean() + sum(output.losses.values())


compare("tokenizer", model.train(), engine, tokenizer_loss)
compare("discriminator", discriminator, d_engine, lambda module: module(images).square().mean())
if is_main_process():
    Path(sys.argv[1]).write_text(json.dumps(distances))
